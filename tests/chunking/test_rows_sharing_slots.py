"""Rows whose chunks share a row of slots: only the memory changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.chunking_pieces import decided
from tests.networks import NETWORKS, quick_jit, random_params

B, L = 6, 23
IDS = np.random.default_rng(7).integers(0, 256, (B, L)).astype(np.int32)
DOCUMENTS = np.repeat(np.int32([1, 2, 5]), (11, 5, 7))
SEGMENTS = np.stack(
    [np.ones(L, np.int32), DOCUMENTS, np.where(np.arange(L) < 19, DOCUMENTS, 0)] * 2
)


def outputs(graph, params, ids_BL, rows_sharing_slots, capacities=None):
    model = nnx.merge(graph, params)
    return model(
        ids_BL, SEGMENTS, rows_sharing_slots=rows_sharing_slots, capacities=capacities,
        route_ids_BL=ids_BL % 2 if model.config.num_routes > 1 else None,
    )  # fmt: skip


only_outputs = quick_jit(outputs, static_argnums=(0, 3, 4))


@partial(quick_jit, static_argnums=(0, 4, 5))
def outputs_and_gradient(graph, params, ids_BL, cotangent_BLV, rows_sharing_slots, capacities=None):
    def scalar(params):
        logits_BLV, routes = outputs(graph, params, ids_BL, rows_sharing_slots, capacities)
        return jnp.sum(logits_BLV * cotangent_BLV), (logits_BLV, routes)

    (_, found), grads = jax.value_and_grad(scalar, has_aux=True)(params)
    return found, grads


ALL = ["one_stage", "two_stage", "pooled_ends", "routed", "passes"]


@pytest.mark.few("name", ["pooled_ends"], ALL)
def test_rows_that_share_slots_give_what_separate_rows_give(name):
    """Outputs and gradients, with exactly as many slots as the packed rows want."""
    graph, params = random_params(NETWORKS[name])
    cotangent_BLV = np.random.default_rng(8).normal(size=(B, L, 256)).astype(np.float32)
    (logits, routes), grads = outputs_and_gradient(graph, params, IDS, cotangent_BLV, 1)
    wanted = tuple(int(route.num_slots_G.reshape(2, -1).sum(1).max()) for route in routes[:1])
    capacities = (*wanted, *(None,) * (len(routes) - 1))
    (packed_logits, packed_routes), packed_grads = outputs_and_gradient(
        graph, params, IDS, cotangent_BLV, 3, capacities
    )
    np.testing.assert_allclose(packed_logits, logits, rtol=0, atol=2e-5)
    assert np.array_equal(packed_routes[0].boundary_mask_BL, routes[0].boundary_mask_BL)
    assert packed_routes[0].num_slots_G.shape == (2,)
    for ours, theirs in zip(packed_routes, routes):  # inner ones lie in other shapes
        assert ours.num_boundaries_B.sum() == theirs.num_boundaries_B.sum()
        assert (ours.segment_ids_BL != 0).sum() == (theirs.segment_ids_BL != 0).sum()
    for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max() + 1e-6)


def test_a_row_does_not_notice_the_future_of_a_row_it_shares_slots_with():
    """Its own past is unchanged bit for bit, and so are the rows before the changed one."""
    graph, params = random_params(NETWORKS["one_stage"])
    changed = IDS.copy()
    changed[1, 9:] = (changed[1, 9:] + 101) % 256
    before, after = (np.asarray(only_outputs(graph, params, ids, 3)[0]) for ids in (IDS, changed))
    assert np.array_equal(before[1, :9], after[1, :9]) and np.array_equal(before[0], after[0])
    assert not np.array_equal(before[1, 9], after[1, 9])
    np.testing.assert_allclose(before[2:], after[2:], rtol=0, atol=2e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(["start", "end"]))
def test_slots_are_given_to_rows_in_their_order(seed, capacity, alignment):
    rng = np.random.default_rng(seed)
    p_BL = rng.uniform(size=(4, 7)).astype(np.float32)
    segment_ids_BL = np.sort(rng.integers(0, 3, (4, 7)), axis=1)[:, ::-1].astype(np.int32)
    route = decided(p_BL, segment_ids_BL, capacity, has_null_chunk=alignment == "end", rows=2)
    for first in (0, 2):
        slots = 0
        for row in (first, first + 1):
            wanted = 0
            for t in range(7):
                segment = segment_ids_BL[row, t]
                opens = segment != 0 and (t == 0 or segment != segment_ids_BL[row, t - 1])
                cuts = segment != 0 and (p_BL[row, t] > 0.5 or (opens and alignment == "start"))
                slots += int(cuts) + int(opens and alignment == "end")
                wanted += int(cuts)
                assert bool(route.boundary_mask_BL[row, t]) == (cuts and slots <= capacity)
            assert route.num_boundaries_B[row] == wanted
        assert route.num_slots_G[first // 2] == slots
