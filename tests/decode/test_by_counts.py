"""The pass on as many slots as the boundaries need, against the pass on all slots."""

from functools import partial

import numpy as np
import pytest
from flax import nnx

from hnet.chunking.slots import bucket
from hnet.config import PUBLISHED
from hnet.cost import count
from hnet.decode import by_counts
from hnet.decode.by_counts import LEAST_STEP, PER_OCTAVE, Fed, Static, forward
from hnet.flops import forward_flops, stage_lengths, total
from tests.networks import NETWORKS, quick_jit, random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

L = 211  # positions; a prime, so that every size of slots has spare ones
FLOPS = 1.25  # largest ratio of operations executed and needed


def outputs(done):
    records = [(r.boundary_mask_BL, r.boundary_prob_BL) for r in done.boundaries]
    return done.logits_BLV, records, [r.num_slots_G for r in done.boundaries]


@pytest.mark.few("name", ["routed"], list(NETWORKS))
def test_logits_are_those_of_all_slots_at_few_more_operations_than_needed(name, monkeypatch):
    config, executed = NETWORKS[name], []

    def counted(program):
        def run(*args, **static):
            executed.append(total(count(partial(program.__wrapped__, **static), *args)))
            return program(*args, **static)

        return run

    for program in ("_open", "_finish"):
        monkeypatch.setattr(by_counts, program, counted(getattr(by_counts, program)))
    graph, params = random_params(config)
    ids_BL = np.random.default_rng(0).integers(0, 256, (2, L)).astype(np.int32)
    segment_ids_BL = np.where(np.arange(L) < 101, 1, 2) * np.ones((2, 1), np.int32)
    segment_ids_BL[1, 190:] = 0
    routes_BL = ids_BL % config.num_routes

    @quick_jit
    def on_all_slots(params):
        logits, records = nnx.merge(graph, params)(ids_BL, segment_ids_BL, route_ids_BL=routes_BL)
        return logits, [(r.boundary_mask_BL, r.boundary_prob_BL) for r in records]

    expected, masks = on_all_slots(params)
    fed = Fed(ids_BL, segment_ids_BL, routes_BL)
    logits, found, counts = forward(Static(graph, config), params, fed, outputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    for (mask, p), (whole, whole_p) in zip(found, masks):
        n = mask.shape[1]
        np.testing.assert_array_equal(mask, whole[:, :n])
        np.testing.assert_allclose(p, whole_p[:, :n], rtol=0, atol=1e-6)
        assert not whole[:, n:].any()
    if len(found) > 1:
        assert found[1][0].shape[1] < 0.7 * L
    needed = forward_flops(config, (L, *(int(np.max(slots)) for slots in counts)))
    assert len(executed) == config.num_chunked + 1
    assert sum(executed) <= FLOPS * 2 * total(needed)


@pytest.mark.few("name", ["1stage_L"], list(PUBLISHED))
def test_published_sizes_execute_few_more_operations_than_needed(name):
    config = PUBLISHED[name]
    needed = tuple(map(int, stage_lengths(config, 8191)))
    slots = (bucket(1 << 31, n, PER_OCTAVE, LEAST_STEP) for n in needed[1:])
    ratio = total(forward_flops(config, (8191, *slots))) / total(forward_flops(config, needed))
    assert 1 <= ratio <= FLOPS
    assert total(forward_flops(config, (8191,) * len(needed))) > 3 * total(
        forward_flops(config, needed)
    )
