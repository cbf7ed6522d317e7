"""Properties of every network, for any way to chunk: one list, `NETWORKS`, and tests over it.

T1 causality, T3 capacity, T4 packing, T6 degenerate boundaries, T7 the rate loss steers the rate,
T8 rate accounting. (T2 streaming, T5 identity and T9 bits per byte have tests of their own.)
"""

import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.losses.ratio import ratio_loss
from hnet.chunking.rates import boundary_rates
from tests.networks import NETWORKS, optimized_jit, quick_jit, random_params

L = 37  # positions per row; every test uses three rows, so that programs are shared
DOCUMENTS = (17, 13, 7)  # lengths that fill a row
SLOTS = 4  # slots per row in the tests of overflow, in which rows want many more
AS_RUN = ("one_stage",)  # compiled with all optimizations; the others quickly
CLIPPED = ("one_stage", "pooled_ends")  # START and END; the others in the forward pass only

# Networks of parts that tests/parts/test_parts.py (documents, padding) and test_combinations.py
# (causality, packing) have too; others here have stages within stages and their own layers.
REPEATED = ("three_stage", "pooled_ends", "spacelike_tied", "hat_words", "routed_offsets")
ALL = pytest.mark.few("name", [n for n in NETWORKS if n not in REPEATED], [*NETWORKS])
CHUNKED = [n for n, c in NETWORKS.items() if c.num_chunked]
# tests/parts/test_combinations.py clips every pool and dechunk of one stage
FULL = pytest.mark.few("name", ["two_stage", "levels"], CHUNKED)
CHUNKED = pytest.mark.few("name", [n for n in CHUNKED if n not in REPEATED], CHUNKED)


@cache
def build(name):
    """(structure, parameters)"""
    return random_params(NETWORKS[name])


def _forward(graph, params, ids_BL, segment_ids_BL, capacities):
    model = nnx.merge(graph, params)
    route_ids_BL = ids_BL % 2 if model.config.num_routes > 1 else None
    return model(ids_BL, segment_ids_BL, capacities=capacities, route_ids_BL=route_ids_BL)


_as_run = optimized_jit(_forward, static_argnums=(0, 4))
_quick = quick_jit(_forward, static_argnums=(0, 4))


def forward(name, ids_BL, segment_ids_BL, capacities=None):
    """(logits, routes) as numpy arrays, so that slicing them compiles nothing."""
    run = _as_run if name in AS_RUN and capacities is None else _quick
    return jax.tree.map(np.asarray, run(*build(name), ids_BL, segment_ids_BL, capacities))


@partial(quick_jit, static_argnums=(0, 5, 6))
def gradient(graph, params, ids_BL, segment_ids_BL, cotangent_BLV, capacities, embeddings_only):
    """Gradient of sum(logits * cotangent), and the outputs of the routers."""

    def scalar(chosen):
        logits_BLV, routes = _forward(graph, params | chosen, ids_BL, segment_ids_BL, capacities)
        return jnp.sum(logits_BLV * cotangent_BLV), routes

    names = ("embeddings",) if embeddings_only else params
    return jax.grad(scalar, has_aux=True)({name: params[name] for name in names})


def random_bytes(seed, low=0, high=256, shape=(3, L)):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


ONE_DOCUMENT = np.ones(L, np.int32)
PACKED = np.repeat(np.int32([1, 2, 3]), DOCUMENTS)
PADDED = np.where(np.arange(L) < 29, PACKED, 0)
MIXED_ROWS = np.stack([ONE_DOCUMENT, PACKED, PADDED])
PACKED_ROWS = np.stack([PACKED] * 3)
ENDS = np.cumsum(DOCUMENTS)
STARTS = ENDS - DOCUMENTS


def segment_starts(segment_ids):
    return (segment_ids != 0) & (np.diff(segment_ids, axis=1, prepend=-1) != 0)


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


def assert_close(ours, theirs):
    """Tolerance for documents in one row: the SSD takes differences of sums over its blocks."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


# --- T1: causality ------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("change", ["one byte", "all later bytes"])
def test_causality_bit_for_bit(name, change):
    """logits at t, and the decision at t, depend only on bytes up to t."""
    ids = random_bytes(1)
    before, routes_before = forward(name, ids, MIXED_ROWS)
    for times in [(5, 30, 18), (19, 1, 24)]:
        changed = ids.copy()
        for row, t in enumerate(times):
            until = t + 1 if change == "one byte" else L
            changed[row, t:until] = (changed[row, t:until] + 101) % 256
        after, routes_after = forward(name, changed, MIXED_ROWS)
        for row, t in enumerate(times):
            assert np.array_equal(bits(before[row, :t]), bits(after[row, :t]))
            assert not np.array_equal(before[row, t], after[row, t])
            if routes_before:
                old, new = (r[0].boundary_prob_BL[row, :t] for r in (routes_before, routes_after))
                assert np.array_equal(bits(old), bits(new))


@pytest.mark.every
def test_causality_of_routes_as_run(monkeypatch):
    """With all optimizations; `one_stage` and tests/nn/test_mixers.py have other parts so."""
    monkeypatch.setattr(sys.modules[__name__], "AS_RUN", ("routed",))
    test_causality_bit_for_bit("routed", "one byte")


@pytest.mark.few("length", [1, 20], [1, 8, 20])
def test_a_row_may_be_of_any_length(length):
    """One byte, whole blocks, a ragged last block: the result is a prefix of a longer row's."""
    ids = random_bytes(13)
    whole, _ = forward("one_stage", ids, MIXED_ROWS)
    start, _ = forward("one_stage", ids[:, :length], MIXED_ROWS[:, :length], (None,))
    assert_close(start, whole[:, :length])


# --- T4: documents are independent --------------------------------------------------------------


@ALL
def test_packed_documents_equal_separate_documents(name):
    ids = random_bytes(2)
    packed, packed_routes = forward(name, ids, PACKED_ROWS)
    separate_ids, separate_segments = np.zeros((3, L), np.int32), np.zeros((3, L), np.int32)
    for row, (start, end) in enumerate(zip(STARTS, ENDS)):
        separate_ids[row, : end - start] = ids[0, start:end]
        separate_segments[row, : end - start] = 1
    separate, separate_routes = forward(name, separate_ids, separate_segments)
    for row, (start, end) in enumerate(zip(STARTS, ENDS)):
        assert_close(packed[0, start:end], separate[row, : end - start])
        if packed_routes:
            ours = packed_routes[0].boundary_mask_BL[0, start:end]
            assert np.array_equal(ours, separate_routes[0].boundary_mask_BL[row, : end - start])


@ALL
def test_only_where_ids_change_counts_and_padding_is_not_seen(name):
    """A segment id may occur again later in the row; padding may be anywhere, with any bytes."""
    ids = random_bytes(12)
    logits, _ = forward(name, ids, PACKED_ROWS)
    again, _ = forward(name, ids, np.int32([7, 2, 7])[PACKED_ROWS - 1])
    assert np.array_equal(bits(logits), bits(again))

    index = np.arange(L)
    seen = np.stack([index >= 5, (index < 9) | (index > 19), index < 22])
    segments = np.where(seen, PACKED_ROWS, 0)
    logits, _ = forward(name, ids, segments)
    again, _ = forward(name, np.where(seen, ids, 255 - ids), segments)
    assert_close(logits[seen], again[seen])


@pytest.mark.few(
    ("name", "clip"),
    [("routed", False)],  # whose program other tests run too
    [(n, False) for n in NETWORKS],
    beside=[(n, True) for n in CLIPPED],
)
def test_gradient_between_documents_is_exactly_zero(name, clip):
    """Document A uses bytes below 128, B those above; the scalar depends on B's logits above 128.

    So embedding rows below 128 get a gradient only through a leak (also with tied heads).
    """
    graph, params = build(name)
    ids = np.concatenate([random_bytes(8, 0, 128, (3, 17)), random_bytes(9, 128, 256, (3, 20))], 1)
    cotangent = np.zeros((3, L, 256), np.float32)
    cotangent[:, 17:, 128:] = np.random.default_rng(0).normal(size=(3, 20, 128))
    capacities = too_few(name) if clip else None
    grads, _ = gradient(graph, params, ids, PACKED_ROWS, cotangent, capacities, clip)
    embedding = np.asarray(grads["embeddings"]["embedding"])
    assert np.all(embedding[:128] == 0)
    assert np.all(np.any(embedding[np.unique(ids[:, 17:])] != 0, axis=1))


# --- T3: slots ----------------------------------------------------------------------------------


def too_few(name):
    """Capacities with fewer slots in the first stage than any document of 17 bytes wants."""
    return (SLOTS, *(None,) * (NETWORKS[name].num_chunked - 1))


def slots_asked_for(name, route):
    """Slots that each row has opened up to each position, null chunks included."""
    opened = route.boundary_mask_BL.astype(np.int32)
    if NETWORKS[name].stages[0].chunking.has_null_chunk:
        opened = opened + segment_starts(route.segment_ids_BL)
    return opened.cumsum(1)


NESTED = [n for n, c in NETWORKS.items() if c.num_chunked > 1]


@pytest.mark.few("name", ["two_stage"], NESTED)
def test_capacity_above_need_changes_nothing(name):
    """Of nested stages; tests/parts has all ways to chunk in one."""
    ids = random_bytes(3)
    free, free_routes = forward(name, ids, MIXED_ROWS)
    needed = tuple(int(r.num_slots_G.max()) for r in free_routes)
    assert all(m < r.boundary_mask_BL.shape[1] for m, r in zip(needed, free_routes))
    tight, tight_routes = forward(name, ids, MIXED_ROWS, needed)
    assert_close(free, tight)
    for free_route, tight_route in zip(free_routes, tight_routes):
        width = tight_route.boundary_mask_BL.shape[1]
        assert np.array_equal(free_route.boundary_mask_BL[:, :width], tight_route.boundary_mask_BL)
        assert np.array_equal(free_route.num_boundaries_B, tight_route.num_boundaries_B)


@FULL
def test_overflow_is_clipped_and_counted(name):
    """Too many boundaries: the first are kept; nothing changes before the first clipped one."""
    ids = random_bytes(4)
    free, (free_route, *_) = forward(name, ids, MIXED_ROWS)
    clipped, (route, *_) = forward(name, ids, MIXED_ROWS, too_few(name))
    asked = slots_asked_for(name, free_route)
    assert np.array_equal(route.num_slots_G, asked[:, -1]) and asked[:, -1].min() > SLOTS
    assert np.array_equal(route.num_boundaries_B, free_route.boundary_mask_BL.sum(1))
    assert np.array_equal(route.boundary_mask_BL, free_route.boundary_mask_BL & (asked <= SLOTS))
    assert np.all(np.isfinite(clipped))
    for row in range(3):
        t = np.searchsorted(asked[row], SLOTS + 1)  # the first position that finds no slot
        assert t > 3
        assert_close(free[row, :t], clipped[row, :t])
        assert np.abs(free[row, t:] - clipped[row, t:]).max() > 1e-2


@FULL
def test_position_clipped_with_its_segment_start_reads_no_other_document(name):
    """Documents whose slots were all clipped do not see the document that used the slots."""
    results = []
    for seed in (11, 40):
        ids = random_bytes(7)
        ids[:, : ENDS[0]] = random_bytes(seed)[:, : ENDS[0]]
        logits, (route, *_) = forward(name, ids, PACKED_ROWS, too_few(name))
        assert np.all(slots_asked_for(name, route)[:, ENDS[0] - 1] == SLOTS)
        results.append(logits[:, ENDS[0] :])
    assert_close(*results)


# --- T6: all boundaries, or none ----------------------------------------------------------------


def force_boundaries(params, everywhere):
    """Learned routers that have boundaries everywhere or nowhere on one repeated byte."""
    sign = -1.0 if everywhere else 1.0

    def change(path, leaf):
        keys = [k.key for k in path]
        if "q_proj_layer" in keys or "k_proj_layer" in keys:
            eye = jnp.broadcast_to(jnp.eye(*leaf.shape[-2:], dtype=leaf.dtype), leaf.shape)
            return sign * eye if "k_proj_layer" in keys else eye
        if "routing_module" in keys and keys[-2:] == ["fc2", "bias"]:
            return leaf - 40.0 * sign
        return leaf

    return jax.tree_util.tree_map_with_path(change, params)


def is_learned(stage):
    return stage.chunking.predictor.part.is_learned


LEARNED = [n for n, c in NETWORKS.items() if c.num_chunked and is_learned(c.stages[0])]


@pytest.mark.few("name", ["routed"], LEARNED)
@pytest.mark.parametrize("everywhere", [True, False])
def test_degenerate_boundaries_have_finite_gradients(name, everywhere):
    """All positions are boundaries, or none but those that a segment starts with (START).

    One row holds nothing but padding.
    """
    graph, params = build(name)
    ids = np.full((3, L), 65, np.int32)
    cotangent = np.random.default_rng(0).normal(size=(3, L, 256)).astype(np.float32)
    forced = force_boundaries(params, everywhere)
    segments = np.stack([ONE_DOCUMENT, PADDED, np.zeros(L, np.int32)])
    grads, routes = gradient(graph, forced, ids, segments, cotangent, None, False)
    for stage, route in zip(NETWORKS[name].stages, routes):
        if is_learned(stage):
            segments = np.asarray(route.segment_ids_BL)
            nowhere = segment_starts(segments) & (stage.chunking.alignment == "start")
            expected = (segments != 0) if everywhere else nowhere
            assert np.array_equal(route.boundary_mask_BL, expected)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), path


# --- T7, T8: the rate ---------------------------------------------------------------------------


def test_rate_loss_steers_the_rate():
    """Descent on only the ratio loss moves the mean boundary probability towards 1 / target."""
    graph, params = build("one_stage")
    ids = random_bytes(10)

    @quick_jit
    def descend(params, target_ratio):
        def loss(params):
            F, G = boundary_rates(_forward(graph, params, ids, MIXED_ROWS, None)[1][0])
            return ratio_loss(F, G, target_ratio), (F, G)

        grads, rates = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), rates

    for target_ratio, direction in [(8.0, -1), (1.25, 1)]:
        moved, (first_F, first_G) = descend(params, target_ratio)
        for _ in range(12):
            moved, (F, G) = descend(moved, target_ratio)
        assert direction * (G - first_G) > 0.05 and direction * (F - first_F) > 0.05


@CHUNKED
def test_reported_rate_is_boundaries_over_positions(name):
    """F is micro-averaged: all boundaries of the batch over all its valid positions."""
    _, routes = forward(name, random_bytes(11), MIXED_ROWS)
    slots = (MIXED_ROWS != 0).sum(1)
    for route in routes:
        F, G = boundary_rates(route)
        mask, valid = route.boundary_mask_BL, route.segment_ids_BL != 0
        assert np.array_equal(valid.sum(1), slots)  # the slots of the stage outside
        assert not np.any(mask & ~valid)
        assert F == pytest.approx(mask.sum() / valid.sum(), rel=1e-6)
        assert G == pytest.approx(route.boundary_prob_BL[valid].mean(), rel=1e-5)
        slots = route.num_slots_G
