"""START alignment, from probabilities to chunks and back, against plain loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hnet.chunking.boundaries import share_slots
from hnet.chunking.dechunks.ema import confidence
from hnet.chunking.dechunks.prefix import insert_prefixes
from hnet.chunking.ema import EMA_BLOCK, ema, ema_reference
from hnet.chunking.predictors.cosine import half_cosine_distance
from hnet.nn.context import Context
from tests import oracles
from tests.chunking_pieces import chunked, dechunked, decided, previous
from tests.golden_data import relative_error
from tests.networks import optimized_jit, quick_jit

B, L, D = 2, 13, 3
rng = np.random.default_rng(0)


# --- routing ------------------------------------------------------------------------------------


def test_cosine_distance_of_equal_opposite_and_zero_states():
    h = np.float32([[[1, 2], [2, 4], [-1, -2], [0, 0], [2, -1], [1, 2]]])
    p = half_cosine_distance(previous(h), h)
    np.testing.assert_allclose(p[0], [0.5, 0, 1, 0.5, 0.5, 0.5], atol=1e-7)
    gradient = jax.grad(lambda h: jnp.sum(half_cosine_distance(previous(h), h)))(h)
    assert np.all(np.isfinite(gradient))


def test_boundaries_are_strictly_above_a_half_and_at_segment_starts():
    p = np.float32([[0.2, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.9, 0.1, 0.9]])
    route = decided(p, np.int32([[1, 1, 1, 1, 2, 0]]), 6)
    assert np.array_equal(route.boundary_mask_BL, [[True, False, True, True, True, False]])
    expected = np.float32([[1, 0.5, p[0, 2], 0.9, 1, 0]])
    assert np.array_equal(route.boundary_prob_BL, expected)
    assert np.array_equal(route.num_boundaries_B, [4])
    expected[0, 1] = 0.5  # confidence: p at boundaries, 1 - p elsewhere
    assert np.array_equal(route.selected_prob_BL, [[1, 0.5, p[0, 2], np.float32(0.9), 1, 1]])


# --- chunk and dechunk --------------------------------------------------------------------------


@st.composite
def cut_rows(draw):
    """(p, segment ids) of packed, right-padded rows; p at, above and beyond what the EMA clips."""
    p = st.sampled_from([0.0, 0.3, 0.5, 0.51, 0.8, 1 - 1e-5, 1.0])
    probs = draw(st.lists(st.lists(p, min_size=L, max_size=L), min_size=B, max_size=B))
    segments = np.zeros((B, L), np.int32)
    for b in range(B):
        ends = sorted(draw(st.lists(st.integers(1, L), min_size=1, max_size=4)))
        for i, (start, end) in enumerate(zip([0, *ends], ends)):
            segments[b, start:end] = i + 1
    return np.float32(probs), segments


@partial(quick_jit, static_argnames="capacity")
def there_and_back(x_BLD, y_BMD, p_BL, segment_ids_BL, capacity):
    found = decided(p_BL, segment_ids_BL, capacity)
    chunks = chunked(x_BLD, found, capacity)
    return found, chunks, dechunked(y_BMD, chunks, found)


@pytest.mark.parametrize("capacity", [5, L])
@given(cut_rows())
def test_slots_and_positions_are_those_of_a_walk_along_the_row(capacity, rows):
    p, segments = rows
    x, y = np.float32(rng.normal(size=(B, L, D))), np.float32(rng.normal(size=(B, capacity, D)))
    route, chunks, out = jax.tree.map(
        np.asarray, there_and_back(x, y, p, segments, capacity=capacity)
    )

    wanted = (p > 0.5) & (segments != 0)
    wanted |= (segments != 0) & (np.diff(segments, axis=1, prepend=0) != 0)
    kept = np.zeros_like(wanted)
    for b in range(B):
        kept[b, np.flatnonzero(wanted[b])[:capacity]] = True
    assert np.array_equal(route.boundary_mask_BL, kept)
    assert np.array_equal(route.num_boundaries_B, wanted.sum(1))

    states, chunk_segments, probs = oracles.chunk(
        x, kept, route.boundary_prob_BL, segments, capacity
    )
    assert np.array_equal(chunks.x_BMD, states)
    assert np.array_equal(chunks.segment_ids_BM, chunk_segments)
    assert np.array_equal(chunks.slots.boundary_prob_BM, probs)

    expected = oracles.dechunk(y, kept, route.boundary_prob_BL, segments)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_a_chunk_at_every_position_gives_the_states_back():
    """P = 1 is clipped to 1 - 1e-4, so that a trace of the previous state remains."""
    x = np.float32(rng.normal(size=(B, L, D)))
    ones = np.ones((B, L), np.float32)
    _, _, out = there_and_back(x, x, ones, np.ones((B, L), np.int32), capacity=L)
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    np.testing.assert_allclose(out, (1 - 1e-4) * x + 1e-4 * before, rtol=0, atol=3e-7)


def test_gradient_of_p_is_the_closed_form():
    """With g the gradient of the output, u the upsampled chunks and G_s the sum of g over slot s:

    -g_t.u_t where there is no boundary; where slot m starts,
    g_t.u_t + sum_{s >= m} G_s.(y_m - z_{m-1}) prod_{m < r <= s} (1 - P_r).
    """
    length, width = 23, 5
    p = np.float32(rng.uniform(0.02, 0.98, size=(1, length)))
    y, g = (np.float32(rng.normal(size=(1, length, width))) for _ in range(2))
    segments = np.ones((1, length), np.int32)

    def scalar(p):
        _, _, out = there_and_back.__wrapped__(y, y, p, segments, length)
        return jnp.sum(out * g)

    ours = quick_jit(jax.grad(scalar))(p)[0]

    p, y, g = np.float64(p[0]), np.float64(y[0]), np.float64(g[0])
    starts = [0, *(t for t in range(1, length) if p[t] > 0.5)]
    gate = np.clip([1.0, *p[starts[1:]]], 1e-4, 1 - 1e-4)
    z = np.zeros((len(starts) + 1, width))  # z[m] before slot m
    for m in range(len(starts)):
        z[m + 1] = gate[m] * y[m] + (1 - gate[m]) * z[m]
    slot = np.searchsorted(starts, np.arange(length), side="right") - 1
    per_slot = [g[slot == s].sum(0) for s in range(len(starts))]
    expected = np.array([-g[t] @ z[slot[t] + 1] for t in range(length)])
    expected[0] = 0  # the first p is forced to 1
    for m, t in list(enumerate(starts))[1:]:
        expected[t] *= -1
        for s in range(m, len(starts)):
            passed_on = np.prod(1 - gate[m + 1 : s + 1])
            expected[t] += per_slot[s] @ (y[m] - z[m]) * passed_on
    assert len(starts) > 8
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_confidence_is_one_with_the_gradient_of_c():
    c = jnp.float32([0.1, 0.7])
    assert np.array_equal(confidence(c), [1, 1])
    assert np.array_equal(jax.grad(lambda c: jnp.sum(confidence(c) * c))(c), 1 + c)


# --- the EMA ------------------------------------------------------------------------------------

M = EMA_BLOCK**2 + 79  # blocks of blocks of blocks
Y = np.float32(rng.normal(size=(B, M, D)))
# mostly so small that a state persists over blocks
GATE = rng.choice([1e-4, 3e-3, 0.5, 1 - 1e-4], size=(B, M), p=[0.6, 0.37, 0.02, 0.01])
GATE = GATE.astype(np.float32)
CHUNK_SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 60, M - 65]), np.repeat([1, 0], [50, M - 50])])
CHUNK_SEGMENTS = CHUNK_SEGMENTS.astype(np.int32)


@pytest.mark.parametrize("slots", [1, 5, EMA_BLOCK, 2 * EMA_BLOCK + 7, M])
@pytest.mark.parametrize("smooth", [ema, ema_reference])
def test_ema_is_the_recurrence(smooth, slots):
    inputs = Y[:, :slots], GATE[:, :slots], CHUNK_SEGMENTS[:, :slots]
    assert relative_error(quick_jit(smooth)(*inputs), oracles.ema(*inputs)) < 2e-6


def test_ema_of_small_gates_forgets_nothing_over_many_blocks():
    """One state, then gates that are almost closed: (1 - 1e-4)^m must not drift."""
    gate = np.full((1, 1000), 1e-4, np.float32)
    gate[0, 0] = 1 - 1e-4
    y = np.zeros((1, 1000, 1), np.float32)
    y[0, 0] = 1
    z = quick_jit(ema)(y, gate, np.ones((1, 1000), np.int32))
    expected = (1 - 1e-4) * (1 - 1e-4) ** np.arange(1000)
    np.testing.assert_allclose(z[0, :, 0], expected, rtol=1e-5)


def test_gradients_of_the_ema_are_those_of_the_recurrence():
    cotangent = np.float32(rng.normal(size=(B, M, D)))

    def gradients(f):
        scalar = lambda y, gate: jnp.sum(f(y, gate, CHUNK_SEGMENTS) * cotangent)
        return quick_jit(jax.grad(scalar, (0, 1)))(Y, GATE)

    for ours, slow in zip(gradients(ema), gradients(ema_reference)):
        assert relative_error(ours, slow) < 1e-5


# --- sharding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_sharing_slots", [1, 2])
def test_batch_sharded_chunking_moves_nothing_between_devices(rows_sharing_slots):
    """Routing, chunk, EMA and dechunk, and their gradient, on eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    capacity = 41

    def scalar(x_BLD, segment_ids_BL, cotangent_BLD):
        p_BL = half_cosine_distance(previous(x_BLD), x_BLD)
        found = decided(p_BL, segment_ids_BL, capacity, rows=rows_sharing_slots)
        shared_BLD, shared, _ = share_slots(x_BLD, found, Context(segment_ids_BL))
        chunks = chunked(shared_BLD, shared, capacity)
        out_BLD = dechunked(jnp.tanh(chunks.x_BMD), chunks, shared).reshape(x_BLD.shape)
        return jnp.sum(out_BLD * cotangent_BLD, axis=(1, 2)), out_BLD

    def with_gradient(x_BLD, segment_ids_BL, cotangent_BLD):
        per_row, pull_back, out = jax.vjp(
            lambda x: scalar(x, segment_ids_BL, cotangent_BLD), x_BLD, has_aux=True
        )
        return pull_back(jnp.ones_like(per_row))[0], out

    shape = jax.ShapeDtypeStruct((16, 97, 5), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((16, 97), jnp.int32, sharding=rows)
    compiled = (
        optimized_jit(with_gradient, out_shardings=(rows, rows)).lower(shape, ids, shape).compile()
    )
    text = compiled.as_text()
    assert "f32[2,97,5]" in text  # two rows per device
    for collective in (
        "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter",
    ):  # fmt: skip
        assert collective not in text


@pytest.mark.parametrize("instead", [False, True])
def test_rows_with_prefixes_are_those_of_a_loop(instead):
    """Each boundary's vectors stand before it, or the last of them in its place."""
    rng = np.random.default_rng(3)
    (B, L, D), k = (3, 11, 2), 3
    mask_BL = rng.random((B, L)) < [[0.4], [1.0], [0.0]]
    x_BLD = rng.normal(size=(B, L, D)).astype(np.float32)
    vectors_BLX = rng.normal(size=(B, L, k * D)).astype(np.float32)
    ids_BL = np.where(np.arange(L) < [[11], [7], [4]], 1 + np.cumsum(mask_BL, 1), 0)
    mask_BL &= ids_BL != 0
    found = insert_prefixes(x_BLD, jnp.int32(ids_BL), vectors_BLX, mask_BL, instead=instead, most=8)
    for x_XD, ids_X, place_L, *row in zip(*found, x_BLD, ids_BL, vectors_BLX, mask_BL):
        rows, ids, places = [], [], []
        for x_D, id, vectors_X, is_boundary in zip(*row):
            own = [] if instead and is_boundary else [x_D]
            rows += [*(vectors_X.reshape(k, D) if is_boundary else []), *own]
            ids += [id] * (len(rows) - len(ids))
            places.append(len(rows) - 1)
        n = len(rows)
        assert len(x_XD) == L + (k - instead) * 8 and places == place_L.tolist()
        assert np.array_equal(x_XD[:n], rows) and not np.any(x_XD[n:])
        assert ids_X[:n].tolist() == ids and not np.any(ids_X[n:])
