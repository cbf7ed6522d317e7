"""RMSNorm, SwiGLU, rotary positions and segment helpers against plain numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.nn.kernels.derivatives import gated, rms_norm, skip_gate_norm
from hnet.nn.layers import (
    SwiGLU,
    constrain_rows,
    matmul,
    rotary,
    segment_positions,
    segment_starts,
)
from tests import oracles
from tests.golden_data import relative_error

rng = np.random.default_rng(0)
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=11, max_size=11), min_size=2, max_size=2)


def test_rms_norm():
    x, scale = rng.normal(size=(2, 3, 7)), rng.normal(size=7)
    x[0] *= 3e-3  # so that the epsilon matters
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale[None, None]
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale)), expected, rtol=2e-6)


def test_rms_norm_is_float32_whatever_comes_in():
    x = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.bfloat16)
    out = rms_norm(x, jnp.ones(7))
    assert out.dtype == jnp.float32
    assert np.array_equal(out, rms_norm(x.astype(jnp.float32), jnp.ones(7)))
    assert np.array_equal(rms_norm(jnp.zeros((1, 1, 7)), jnp.ones(7)), np.zeros((1, 1, 7)))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_skip_gate_norm_is_the_norm_of_a_gated_sum(dtype, tolerance):
    y, x, z, cotangent = (jnp.asarray(rng.normal(size=(2, 3, 7)), dtype) for _ in range(4))
    skip, scale = (jnp.float32(rng.normal(size=7)) for _ in range(2))

    def parts(y, x, z, skip, scale):
        y, x, z = (a.astype(jnp.float32) for a in (y, x, z))
        return rms_norm(gated(y + skip[None, None] * x, z), scale)

    def weighted(function):
        return lambda *a: jnp.sum(function(*a).astype(jnp.float32) * cotangent.astype(jnp.float32))

    inputs, numbers = (y, x, z, skip, scale), tuple(range(5))
    out = skip_gate_norm(*inputs)
    assert out.dtype == dtype
    assert relative_error(np.float32(out), parts(*inputs)) < tolerance
    ours, expected = (jax.grad(weighted(f), numbers)(*inputs) for f in (skip_gate_norm, parts))
    for a, b, given_input in zip(ours, expected, inputs):
        assert a.dtype == given_input.dtype
        assert relative_error(np.float32(a), np.float32(b)) < tolerance


def test_swiglu_gates_the_first_half_with_the_second():
    mlp = SwiGLU(5, 3, out_std=0.3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 3, 5))
    y, gate = np.split(x @ np.float64(mlp.fc1.kernel[...]), 2, axis=-1)
    expected = (y * gate / (1 + np.exp(-gate))) @ np.float64(mlp.fc2.kernel[...])
    np.testing.assert_allclose(mlp(jnp.float32(x)), expected, rtol=1e-5, atol=1e-8)


def plain_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale[None, None]


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (rms_norm, plain_norm, [(2, 3, 7), (7,)]),
        (gated, lambda x, gate: x * gate * jax.nn.sigmoid(gate), [(2, 3, 7), (2, 3, 7)]),
        (matmul, jnp.matmul, [(2, 3, 7), (7, 5)]),  # the weight's gradient in both layouts
        (matmul, jnp.matmul, [(2, 3, 5), (5, 7)]),
    ],
)
def test_derivatives_of_our_own(ours, plain, shapes):
    """Custom derivatives equal those of the plain formula, in float64."""
    inputs = [np.float32(3 * rng.normal(size=s)) for s in shapes]
    out, pull = jax.vjp(ours, *inputs)
    cotangent = np.float32(rng.normal(size=out.shape))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        _, plain_pull = jax.vjp(plain, *map(np.float64, inputs))
        expected = plain_pull(np.float64(cotangent))
    for found, wanted in zip(pull(cotangent), expected):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(13, 7), (7, 13), (1, 7), (7, 1)])
@pytest.mark.parametrize("rows", [1, 7])
def test_rounded_matmuls_round_their_inputs_only(rows, widths):
    """Product and gradients are those of rounded operands, in float32, in one compiled program as
    in a step: XLA's CPU backend lacks some forms of the product."""

    def half(a):
        return np.float64(jnp.asarray(a, jnp.bfloat16))

    @jax.jit
    def product_and_gradients(x, weight, cotangent):
        out, pull = jax.vjp(lambda x, w: matmul(x, w, inputs="bfloat16"), x, weight)
        return out, *pull(cotangent)

    shapes = (2, rows, widths[0]), widths, (2, rows, widths[1])
    x, weight, cotangent = (np.float32(rng.normal(size=s)) for s in shapes)
    out, dx, dweight = product_and_gradients(x, weight, cotangent)
    assert {a.dtype for a in (out, dx, dweight)} == {jnp.dtype("float32")}
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(out, half(x) @ half(weight))
    close(dx, half(cotangent) @ half(weight).T)
    close(dweight, np.einsum("bld,blf->df", half(x), half(cotangent)))


@pytest.mark.parametrize("rotary_dim", [0, 6, 8])
def test_rotary(rotary_dim):
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 0, 1], [7, 8, 0, 1000, 4]], np.int32)
    out = rotary(jnp.float32(x), positions, rotary_dim)
    np.testing.assert_allclose(out, oracles.rotary(x, positions, rotary_dim), rtol=0, atol=2e-4)
    assert np.array_equal(out[..., rotary_dim:], np.float32(x)[..., rotary_dim:])


def test_rotary_scores_depend_only_on_distance():
    q, k = (jnp.float32(rng.normal(size=(1, 1, 1, 8))) for _ in range(2))

    def score(at_q, at_k):
        turned = [rotary(x, np.full((1, 1), at, np.int32), 6) for x, at in ((q, at_q), (k, at_k))]
        return float(np.sum(turned[0] * turned[1]))

    assert score(3, 1) == pytest.approx(score(12, 10), rel=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


@given(ROWS)
def test_segment_starts_and_positions(segment_ids):
    segment_ids = np.array(segment_ids, np.int32)
    starts, positions = np.zeros((2, 11), bool), np.zeros((2, 11), int)
    for b, t in np.ndindex(2, 11):
        starts[b, t] = t == 0 or segment_ids[b, t] != segment_ids[b, t - 1]
        positions[b, t] = 0 if starts[b, t] else positions[b, t - 1] + 1
    assert np.array_equal(segment_starts(segment_ids), starts)
    assert np.array_equal(segment_positions(segment_ids), positions)


def laid_out(mesh, x, function=constrain_rows):
    def on_mesh(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(x)

    return jax.jit(on_mesh)(jax.device_put(x, NamedSharding(mesh, P()))).sharding.spec


def test_rows_lie_over_the_mesh_where_it_divides_them():
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=auto)
    rows = P(("data", "fsdp"))
    assert laid_out(mesh, jnp.ones((8, 3))) == rows
    assert laid_out(mesh, jnp.ones((6, 3))) == P()
    assert laid_out(mesh, jnp.ones((5, 8, 3)), jax.vmap(constrain_rows)) == P(None, *rows)
    other = jax.make_mesh((4, 2), ("points", "tensor"), axis_types=auto)
    assert laid_out(other, jnp.ones((8, 3))) == P()
    part = jax.shard_map(constrain_rows, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert part(jnp.ones((16, 3))).shape == (16, 3)  # one device's rows are not sharded again
