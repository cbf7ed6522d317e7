"""What every network must satisfy, whatever cuts it: one list, `NETWORKS`, and tests over it.

T1 causality, T3 capacity, T4 packing, T6 degenerate boundaries, T7 the rate loss steers the rate,
T8 rate accounting. (T2 streaming: test_infer; T5 identity: test_chunking_dechunk; T9: test_loss.)
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import NETWORKS, quick_jit, random_params

from hnet.chunking.rate import boundary_rates, ratio_loss

L = 37  # positions of a row; every test uses three rows, so that programs are shared
DOCUMENTS = (17, 13, 7)  # lengths that fill a row
SLOTS = 4  # what the tests of overflow give to rows that want about 18
PACKED = np.repeat([1, 2, 3], DOCUMENTS)

ALL = pytest.mark.parametrize("name", NETWORKS)
CHUNKED = pytest.mark.parametrize("name", [n for n, c in NETWORKS.items() if c.num_chunked])


def _forward(graph, params, ids_BL, segment_ids_BL, capacities):
    return nnx.merge(graph, params)(ids_BL, segment_ids_BL, capacities=capacities)


# The program people run for the contracts that are bit for bit; a quickly compiled one elsewhere.
_as_run = jax.jit(_forward, static_argnums=(0, 4))
_quick = quick_jit(_forward, static_argnums=(0, 4))


def forward(graph, params, ids_BL, segment_ids_BL):
    """(logits, routes) as numpy arrays, so that slicing them compiles nothing."""
    return jax.tree.map(np.asarray, _as_run(graph, params, ids_BL, segment_ids_BL, None))


def quick_forward(graph, params, ids_BL, segment_ids_BL, capacities):
    return jax.tree.map(np.asarray, _quick(graph, params, ids_BL, segment_ids_BL, capacities))


@partial(quick_jit, static_argnums=(0, 5))
def gradient(graph, params, ids_BL, segment_ids_BL, cotangent_BLV, capacities):
    """Gradient of sum(logits * cotangent) for all parameters, and the routers' outputs."""

    def scalar(params):
        logits_BLV, routes = _forward(graph, params, ids_BL, segment_ids_BL, capacities)
        return jnp.sum(logits_BLV * cotangent_BLV), routes

    return jax.grad(scalar, has_aux=True)(params)


@cache
def build(name):
    return random_params(NETWORKS[name])


def random_bytes(seed, low=0, high=256, shape=(3, L)):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def rows(*segment_ids):
    return np.stack([np.asarray(s, np.int32) for s in segment_ids])


SEGMENTS = rows(np.ones(L), PACKED, np.where(np.arange(L) < 29, PACKED, 0))


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


def too_few(name):
    """Capacities that give the first stage fewer slots than any document of 17 bytes asks for."""
    return (SLOTS, *(None,) * (NETWORKS[name].num_chunked - 1))


@ALL
@pytest.mark.parametrize("change", ["one byte", "all later bytes"])
def test_causality_bit_for_bit(name, change):
    """logits at t, and every decision before it, depend on bytes up to t alone."""
    graph, params = build(name)
    ids = random_bytes(1)
    before, routes_before = forward(graph, params, ids, SEGMENTS)
    for times in [(5, 30, 18), (19, 1, 24)]:
        changed = ids.copy()
        for row, t in enumerate(times):
            until = t + 1 if change == "one byte" else L
            changed[row, t:until] = (changed[row, t:until] + 101) % 256
        after, routes_after = forward(graph, params, changed, SEGMENTS)
        for row, t in enumerate(times):
            assert np.array_equal(bits(before[row, :t]), bits(after[row, :t]))
            assert not np.array_equal(before[row, t], after[row, t])
            for old, new in zip(routes_before[:1], routes_after[:1]):
                assert np.array_equal(
                    bits(old.boundary_prob_BL[row, :t]), bits(new.boundary_prob_BL[row, :t])
                )


@ALL
def test_packed_documents_equal_documents_alone(name):
    graph, params = build(name)
    ids = random_bytes(2)
    packed, packed_routes = forward(graph, params, ids, rows(PACKED, PACKED, PACKED))
    alone_ids, alone_segments = np.zeros((3, L), np.int32), np.zeros((3, L), np.int32)
    starts = np.cumsum((0, *DOCUMENTS))
    for row, (start, end) in enumerate(zip(starts, starts[1:])):
        alone_ids[row, : end - start] = ids[0, start:end]
        alone_segments[row, : end - start] = 1
    alone, alone_routes = forward(graph, params, alone_ids, alone_segments)
    for row, (start, end) in enumerate(zip(starts, starts[1:])):
        np.testing.assert_allclose(
            packed[0, start:end], alone[row, : end - start], rtol=0, atol=2e-5
        )
        for one, other in zip(packed_routes[:1], alone_routes[:1]):
            assert np.array_equal(
                one.boundary_mask_BL[0, start:end], other.boundary_mask_BL[row, : end - start]
            )


@CHUNKED
def test_capacity_above_need_changes_nothing(name):
    graph, params = build(name)
    ids = random_bytes(3)
    free, free_routes = forward(graph, params, ids, SEGMENTS)
    needed = tuple(int(r.num_boundaries_B.max()) for r in free_routes)
    assert all(m < r.boundary_mask_BL.shape[1] for m, r in zip(needed, free_routes))
    tight, tight_routes = quick_forward(graph, params, ids, SEGMENTS, needed)
    np.testing.assert_allclose(free, tight, rtol=0, atol=2e-5)
    for free_route, tight_route in zip(free_routes, tight_routes):
        width = tight_route.boundary_mask_BL.shape[1]
        assert np.array_equal(free_route.boundary_mask_BL[:, :width], tight_route.boundary_mask_BL)
        assert np.array_equal(free_route.num_boundaries_B, tight_route.num_boundaries_B)


@CHUNKED
def test_overflow_is_clipped_and_counted(name):
    """Too many boundaries: the first are kept, and nothing before the first clipped one moves."""
    graph, params = build(name)
    ids = random_bytes(4)
    free, free_routes = forward(graph, params, ids, SEGMENTS)
    clipped, (route, *_) = quick_forward(graph, params, ids, SEGMENTS, too_few(name))
    wanted = np.asarray(free_routes[0].boundary_mask_BL)
    assert np.array_equal(route.num_boundaries_B, wanted.sum(1)) and wanted.sum(1).min() > SLOTS
    assert np.array_equal(route.boundary_mask_BL, wanted & (wanted.cumsum(1) <= SLOTS))
    assert np.all(np.isfinite(clipped))
    for row in range(3):
        first_clipped = np.flatnonzero(wanted[row])[SLOTS]
        assert first_clipped > 3
        same, moved = slice(0, first_clipped), slice(first_clipped, None)
        np.testing.assert_allclose(free[row, same], clipped[row, same], rtol=0, atol=2e-5)
        assert np.abs(free[row, moved] - clipped[row, moved]).max() > 1e-2


@CHUNKED
def test_position_clipped_with_its_segment_start_reads_no_other_document(name):
    """Documents whose every boundary was clipped stay blind to the one that used all slots."""
    graph, params = build(name)
    results = []
    for seed in (5, 6):
        ids = random_bytes(7)
        ids[:, : DOCUMENTS[0]] = random_bytes(seed)[:, : DOCUMENTS[0]]
        logits, (route, *_) = quick_forward(
            graph, params, ids, rows(PACKED, PACKED, PACKED), too_few(name)
        )
        used = np.asarray(route.boundary_mask_BL)
        assert np.all(used[:, : DOCUMENTS[0]].sum(1) == SLOTS)
        results.append(np.asarray(logits))
    # not bit for bit: the SSD subtracts sums that began in the other document
    one, other = (r[:, DOCUMENTS[0] :] for r in results)
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@ALL
@pytest.mark.parametrize("clip", [False, True])
def test_gradient_between_documents_is_exactly_zero(name, clip):
    """Document A uses bytes below 128, B those above; the scalar is made of B's logits above 128.

    So the embedding rows below 128 can get a gradient only through a leak (tied heads included).
    """
    if clip and not NETWORKS[name].num_chunked:
        pytest.skip("has no slots")
    graph, params = build(name)
    capacities = too_few(name) if clip else None
    ids = np.concatenate([random_bytes(8, 0, 128, (3, 17)), random_bytes(9, 128, 256, (3, 20))], 1)
    cotangent = np.zeros((3, L, 256), np.float32)
    cotangent[:, 17:, 128:] = np.random.default_rng(0).normal(size=(3, 20, 128))
    grads, _ = gradient(graph, params, ids, rows(PACKED, PACKED, PACKED), cotangent, capacities)
    embedding = np.asarray(grads["embeddings"]["embedding"])
    assert np.all(embedding[:128] == 0)
    assert np.all(np.any(embedding[np.unique(ids[:, 17:])] != 0, axis=1))


def force_boundaries(params, everywhere):
    """Routers that, on one byte repeated, cut everywhere or nowhere but at a segment's start."""
    sign = -1.0 if everywhere else 1.0

    def change(path, leaf):
        keys = [k.key for k in path]
        if "k_proj_layer" in keys or "q_proj_layer" in keys:
            eye = jnp.eye(*leaf.shape, dtype=leaf.dtype)
            return sign * eye if "k_proj_layer" in keys else eye
        return leaf

    return jax.tree_util.tree_map_with_path(change, params)


@CHUNKED
@pytest.mark.parametrize("everywhere", [True, False])
def test_degenerate_boundaries_have_finite_gradients(name, everywhere):
    graph, params = build(name)
    ids = np.full((3, L), 65, np.int32)
    cotangent = np.random.default_rng(0).normal(size=(3, L, 256)).astype(np.float32)
    forced = force_boundaries(params, everywhere)
    grads, routes = gradient(graph, forced, ids, SEGMENTS, cotangent, None)
    for route in routes:
        valid = np.asarray(route.segment_ids_BL) != 0
        starts = valid & np.diff(route.segment_ids_BL, axis=1, prepend=-1).astype(bool)
        assert np.array_equal(route.boundary_mask_BL, valid if everywhere else starts)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), path


def test_rate_loss_steers_the_rate():
    """Descending the ratio loss alone moves the mean boundary probability towards 1 / target."""
    graph, params = build("one_stage")
    ids = random_bytes(10)

    @quick_jit
    def descend(params, target_ratio):
        def loss(params):
            F, G = boundary_rates(_forward(graph, params, ids, SEGMENTS, None)[1][0])
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
    graph, params = build(name)
    _, routes = forward(graph, params, random_bytes(11), SEGMENTS)
    positions = SEGMENTS
    for route in routes:
        F, G = boundary_rates(route)
        mask, valid = route.boundary_mask_BL, positions != 0
        assert not np.any(mask & ~valid)
        assert F == pytest.approx(mask.sum() / valid.sum(), rel=1e-6)
        assert G == pytest.approx(route.boundary_prob_BL[valid].mean(), rel=1e-5)
        # the boundaries of one stage are the positions of the next
        counts = mask.sum(1)
        positions = (np.arange(mask.shape[1]) < counts[:, None]).astype(np.int32)
