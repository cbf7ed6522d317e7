"""Every part in the tables: results on whole rows equal its streaming form, step by step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.config import ChunkingConfig, settings_of
from hnet.chunking.part import (
    BoundaryPredictor,
    Dechunk,
    Loss,
    LossInputs,
    Place,
    Pool,
    Positions,
    step_through,
)
from hnet.chunking.pools.integrate import Weights
from hnet.chunking.rates import rate_counts
from hnet.chunking.slots import open_slots
from hnet.chunking.table import DECHUNKS, LOSSES, POOLS, PREDICTORS
from hnet.nn.context import Context
from hnet.stage import make_predictor
from tests.networks import quick_jit
from tests.parts.cheap import SETTINGS, limit_for, settings_for

B, L, D = 3, 23, 5
SEGMENTS = np.stack(
    [
        np.ones(L, np.int32),
        np.repeat(np.int32([1, 2, 3]), (9, 11, 3)),
        np.where(np.arange(L) < 17, np.repeat(np.int32([1, 2, 3]), (9, 11, 3)), 0),
    ]
)
ONE_DOCUMENT = np.where(np.arange(L)[None] < np.int32([[L], [7], [0]]), 1, 0).astype(np.int32)
rng = np.random.default_rng(0)
H = rng.normal(size=(B, L, D)).astype(np.float32)


def context_of(segment_ids_BL, routes=1):
    ids = np.random.default_rng(2).choice(np.frombuffer(b" ,.aZ09\n\xc3\xa4", np.uint8), (B, L))
    return Context(
        jnp.asarray(segment_ids_BL),
        route_ids_BL=None if routes == 1 else jnp.asarray(ids % routes, jnp.int32),
        bytes_BL=jnp.asarray(ids, jnp.int32),
        levels_BL=jnp.asarray(ids % 3, jnp.int32),
        external_boundary_BL=jnp.asarray(ids % 4 == 1),
    )


def randomised(module: nnx.Module, seed: int = 1) -> nnx.Module:
    noise = np.random.default_rng(seed)
    graph, params = nnx.split(module)
    draw = lambda a: jnp.asarray(noise.normal(size=a.shape) / 2, a.dtype)
    return nnx.merge(graph, jax.tree.map(draw, params))


def close(ours, theirs):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=3e-6), ours, theirs)


def alignment_of(part: type) -> str:
    return part.alignments[0]


PREDICTOR_CASES = [(name, 1) for name in PREDICTORS.names] + [
    (name, 2) for name in PREDICTORS.names if PREDICTORS.find(name).is_learned and name != "policy"
]


@pytest.mark.parametrize(("name", "routes"), PREDICTOR_CASES)
def test_a_predictor_streams_what_it_predicts(name, routes):
    """Packed documents, padding, and the state after rows of one document."""
    settings = settings_of(SETTINGS.get(name, name), PREDICTORS)
    chunking = ChunkingConfig(3.0, settings, alignment_of(settings.part), routes=routes)
    predictor = randomised(make_predictor(chunking, Place(0, D, D, chunking), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(predictor)

    @quick_jit
    def both(params, segment_ids_BL):
        part = nnx.merge(graph, params)
        rows = Positions(jnp.asarray(H), context_of(segment_ids_BL, routes), settings)
        slow, state = step_through(part.init, part.step, rows)
        return part(rows).probability, slow.probability, part.after(rows), state

    for segments in (SEGMENTS, ONE_DOCUMENT):
        whole, slow, after, state = jax.device_get(both(params, segments))
        valid = segments != 0
        if alignment_of(settings.part) == "start":  # the first p is forced
            valid = valid & (np.diff(segments, axis=1, prepend=-1) == 0)
        close(whole[valid], slow[valid])
        assert np.std(slow[valid]) > 0.01
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), after, state)


@pytest.mark.parametrize("has_null_chunk", [False, True])
@pytest.mark.parametrize("most", [1, 4])
def test_a_chunk_has_at_most_its_maximal_length(has_null_chunk, most):
    p_BL = np.random.default_rng(6).uniform(size=(B, L)).astype(np.float32) ** 3
    found = decide(
        Prediction(prob=p_BL),
        context_of(SEGMENTS),
        2 * L,
        has_null_chunk=has_null_chunk,
        max_chunk_len=most,
    )
    expected = np.zeros((B, L), bool)
    for b in range(B):
        for t, segment in enumerate(SEGMENTS[b]):
            starts = t == 0 or SEGMENTS[b, t - 1] != segment
            if starts:
                last = t - has_null_chunk
            expected[b, t] = segment != 0 and (
                p_BL[b, t] > 0.5 or t - last == most or (starts and not has_null_chunk)
            )
            last = t if expected[b, t] else last
    forced = expected & (p_BL <= 0.5)
    assert forced.sum() > 5 and np.array_equal(found.boundary_mask_BL, expected)
    assert np.all(np.asarray(found.boundary_prob_BL)[forced] == 1)


def boundaries_of(segments, capacity, has_null_chunk, seed=5, most=0):
    p_BL = np.random.default_rng(seed).uniform(size=(B, L)).astype(np.float32)
    context = context_of(segments)
    draw = np.random.default_rng(seed + 1).uniform(size=(2, B, L)).astype(np.float32)
    extra = Weights(*jnp.asarray(draw))
    prediction = Prediction(prob=p_BL, extra=extra)
    found = decide(prediction, context, capacity, has_null_chunk=has_null_chunk, max_chunk_len=most)
    return found, open_slots(found, context, capacity, has_null_chunk=has_null_chunk)


SLOTS = [(null, capacity) for null in (False, True) for capacity in (4, 2 * L)]
SOME = pytest.mark.few("has_null_chunk, capacity", [(False, 2 * L), (True, 4)], SLOTS)


@pytest.mark.parametrize("name", POOLS.names)
@SOME
def test_a_pool_streams_what_it_pools(name, has_null_chunk, capacity):
    settings, most = settings_for(name, POOLS), limit_for(name)
    has_null_chunk &= "end" in settings.part.alignments  # with start there are none
    alignment = "end" if has_null_chunk else alignment_of(settings.part)
    place = Place(0, D, D, ChunkingConfig(3.0, alignment=alignment, max_chunk_len=most))
    graph, params = nnx.split(randomised(settings.part(settings, place, rngs=nnx.Rngs(0))))

    @quick_jit
    def both(params, segment_ids_BL):
        part = nnx.merge(graph, params)
        rows = Positions(jnp.asarray(H), context_of(segment_ids_BL), settings)
        found, slots = boundaries_of(segment_ids_BL, capacity, has_null_chunk, most=most)
        slow = Pool.__call__(part, rows, found, slots)
        used_BM = (slots.context.segment_ids_BL != 0) & ~(
            jnp.zeros_like(slots.context.segment_ids_BL, bool)
            if slots.is_null_BM is None
            else slots.is_null_BM
        )
        states = part.after(rows, found), Pool.after(part, rows, found)
        return part(rows, found, slots), slow, used_BM, states

    for segments in (SEGMENTS, ONE_DOCUMENT):
        whole, slow, used, states = jax.device_get(both(params, segments))
        assert used.sum() > 5
        close(whole[used], slow[used])
    for ours, theirs in zip(*map(jax.tree.leaves, states)):
        close(ours[:2], theirs[:2])  # the third row is empty


@pytest.mark.parametrize("name", DECHUNKS.names)
@SOME
def test_a_dechunk_streams_what_it_gives_back(name, has_null_chunk, capacity):
    """Also if slots were clipped, with all slots of a document in the second row."""
    settings = settings_of(name, DECHUNKS)
    place = Place(0, D, D, ChunkingConfig(3.0))
    graph, params = nnx.split(randomised(settings.part(settings, place, rngs=nnx.Rngs(0))))
    d_in = settings.part.d_in(settings, place)
    y_BMD = rng.normal(size=(B, capacity, d_in)).astype(np.float32)

    @quick_jit
    def both(params, segment_ids_BL):
        part = nnx.merge(graph, params)
        found, slots = boundaries_of(segment_ids_BL, capacity, has_null_chunk)
        slow = Dechunk.__call__(part, y_BMD, found, slots, settings)
        after = part.after(y_BMD, found, slots, settings)
        return (
            part(y_BMD, found, slots, settings),
            slow,
            after,
            Dechunk.after(part, y_BMD, found, slots, settings),
        )

    for segments in (SEGMENTS, ONE_DOCUMENT):
        whole, slow, after, slow_after = jax.device_get(both(params, segments))
        valid = segments != 0
        close(whole[valid], slow[valid])
        adds = not (settings.part.needs_memory or settings.part.stands_in_decoder)
        assert not adds or np.abs(slow[valid]).max() > 0.1
    for ours, theirs in zip(*map(jax.tree.leaves, (after, slow_after))):
        close(ours[:2], theirs[:2])


@pytest.mark.parametrize("name", LOSSES.names)
@pytest.mark.parametrize("has_null_chunk", [False, True])
def test_losses_of_parts_of_a_batch_add_up(name, has_null_chunk):
    settings = settings_of(name, LOSSES)
    routes = 2 if name == "parity" else 1
    targets_R = np.float32([2.5, 4.0][:routes])
    logits_BLV = rng.normal(size=(B, L, 11)).astype(np.float32)

    def loss_of(rows, whole):
        found, _ = boundaries_of(SEGMENTS, 2 * L, has_null_chunk)
        if name.startswith("gate_"):
            found = found._replace(extra=-30 * (1 - found.boundary_prob_BL))
        if name == "policy_gradient":
            logit_BL = jnp.log(found.boundary_prob_BL + 0.1)
            found = found._replace(extra=found.extra.weight + 1, boundary_logit_BL=logit_BL)
        if name == "parity":
            found = found._replace(route_ids_BL=np.indices((B, L)).sum(0) % 2)
        own = found._replace(extra=jax.tree.map(lambda a: a[rows], found.extra), **{
            field: value[rows] for field, value in found._asdict().items()
            if value is not None and field.endswith(("_BL", "_B", "_G"))
        })  # fmt: skip
        counts = rate_counts(own, routes)
        x = LossInputs(
            own, settings, targets_R, has_null_chunk, counts, whole or counts,
            np.zeros((B, L), np.float32)[rows], logits_BLV[rows],
        )  # fmt: skip
        return settings.part()(x), counts

    @quick_jit
    def whole_and_parts():
        everything, counts = loss_of(slice(None), None)
        return everything, [loss_of(slice(row, row + 1), counts)[0] for row in range(B)]

    everything, parts = whole_and_parts()
    assert float(everything) != 0
    np.testing.assert_allclose(sum(map(float, parts)), float(everything), rtol=1e-5)


@pytest.mark.parametrize("table", [PREDICTORS, POOLS, DECHUNKS, LOSSES])
def test_every_part_says_what_it_is_and_has_defaults(table):
    kinds = {PREDICTORS: BoundaryPredictor, POOLS: Pool, DECHUNKS: Dechunk, LOSSES: Loss}
    for name in table.names:
        part = table.find(name)
        settings = part.Config()
        assert issubclass(part, kinds[table]) and settings.part is part and settings.name == name
        assert part.__doc__ and part.Config.__doc__ and settings.problem() is None
        assert all(hasattr(settings, field) for field in settings.traced)
