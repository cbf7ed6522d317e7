"""The SSD and the convolution against plain loops, with segments, and their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.nn.kernels.convolution import causal_conv_silu
from hnet.nn.kernels.ssd_blocks import ssd_blocks
from hnet.nn.ssd import ssd_reference
from tests import oracles
from tests.golden_data import relative_error
from tests.networks import optimized_jit, quick_jit

B, L, H, P, N = 2, 29, 3, 5, 7
rng = np.random.default_rng(0)
INPUTS = {
    "x": rng.normal(size=(B, L, H, P)),
    "dt": rng.uniform(0.01, 2.0, size=(B, L, H)),
    "A": np.array([-0.05, -1.0, -40.0]),  # the last head forgets within a position
    "B": rng.normal(size=(B, L, N)),
    "C": rng.normal(size=(B, L, N)),
}
INPUTS = {name: np.float32(a) for name, a in INPUTS.items()}
SEGMENTS = np.stack([np.repeat([1, 2, 3], [7, 9, 13]), np.repeat([4, 4, 0], [3, 20, 6])])
SEGMENTS = SEGMENTS.astype(np.int32)
blockwise = quick_jit(ssd_blocks, static_argnames="block_len")


def segment_rows(length):
    """Two rows of ids; equal adjacent ids are one segment."""
    lengths = st.lists(st.integers(1, length), min_size=1, max_size=5)
    row = lengths.map(lambda n: np.repeat(np.arange(len(n)), n).astype(np.int32))
    full = row.map(lambda r: np.pad(r, (0, length))[:length])
    return st.tuples(full, full).map(np.stack)


@given(segment_rows(L))
@settings(max_examples=25)
def test_ssd_is_the_recurrence(segment_ids):
    y = blockwise(*INPUTS.values(), segment_ids, block_len=8)
    assert relative_error(y, oracles.ssd(*INPUTS.values(), segment_ids)) < 2e-6


@pytest.mark.parametrize("block_len", [1, 7, 28, 29, 64])
def test_ssd_at_any_block_length(block_len):
    y = blockwise(*INPUTS.values(), SEGMENTS, block_len=block_len)
    assert relative_error(y, oracles.ssd(*INPUTS.values(), SEGMENTS)) < 2e-6


def test_what_was_forgotten_does_not_blur_what_is_remembered():
    """Decays of nearly 1 after many of e^-9, whose logarithms add up to hundreds."""
    draw = np.random.default_rng(1)
    length = 64
    small = draw.uniform(0.005, 0.01, (1, length, 1))
    dt = np.where(draw.random(small.shape) < 0.5, 9.0, small).astype(np.float32)
    x, B_BLN, C_BLN = (
        np.float32(draw.normal(size=(1, length, *shape))) for shape in ((1, P), (N,), (N,))
    )
    x = np.where(dt[..., None] < 1, x, 0)
    inputs = (x, dt, np.float32([-1.0]), B_BLN, C_BLN, np.ones((1, length), np.int32))
    reference = quick_jit(ssd_reference)(*inputs)
    assert relative_error(blockwise(*inputs, block_len=length), reference) < 1e-6


def test_sequential_reference_is_the_recurrence():
    y = quick_jit(ssd_reference)(*INPUTS.values(), SEGMENTS)
    assert relative_error(y, oracles.ssd(*INPUTS.values(), SEGMENTS)) < 2e-6


@pytest.mark.parametrize("block_len", [8, 29])
def test_gradients_are_those_of_the_recurrence(block_len):
    """Also for the head that forgets at once, where differences of long sums would cancel.

    Several cotangents are used, since the gradient by A of one may be nearly zero by chance.
    """
    cotangents = np.float32(rng.normal(size=(7, B, L, H, P)))

    def gradients(f):
        def of(cotangent):
            scalar = lambda *inputs: jnp.sum(f(*inputs, SEGMENTS) * cotangent)
            return jax.grad(scalar, range(5))(*INPUTS.values())

        return quick_jit(jax.vmap(of))(cotangents)

    ours = gradients(lambda *inputs: ssd_blocks(*inputs, block_len=block_len))
    for name, grad, reference in zip(INPUTS, ours, gradients(ssd_reference)):
        if name in ("x", "dt", "A"):  # head by head, so that errors of the forgetting head show
            grad, reference = (
                np.moveaxis(grad, -1 - (name == "x"), 0),
                np.moveaxis(reference, -1 - (name == "x"), 0),
            )
            assert max(map(relative_error, grad, reference)) < 1e-4, name
        else:
            assert relative_error(grad, reference) < 1e-5, name


@pytest.mark.parametrize("block_len", [8, 11])  # the segment starts a block, or lies inside one
def test_no_gradient_crosses_a_segment(block_len):
    cotangent = np.zeros((B, L, H, P), np.float32)
    cotangent[0, 16:] = 1  # the third segment of row 0

    def scalar(x, dt, B, C):
        return jnp.sum(
            ssd_blocks(x, dt, INPUTS["A"], B, C, SEGMENTS, block_len=block_len) * cotangent
        )

    inputs = [INPUTS[n] for n in ("x", "dt", "B", "C")]
    for grad in quick_jit(jax.grad(scalar, range(4)))(*inputs):
        assert np.all(grad[0, :16] == 0) and np.all(grad[1] == 0) and np.any(grad[0, 16:] != 0)


def test_passing_states_on_copies_none_of_the_others():
    """No instruction in a loop copies all states; else the cost is quadratic in the blocks."""
    blocks, T, N = 7, 5, 3
    shapes = (1, blocks * T, 2, 11), (1, blocks * T, 2), (2,), *[(1, blocks * T, N)] * 2
    given = [jnp.ones(shape, jnp.float32) for shape in shapes]
    segment_ids = jnp.ones((1, blocks * T), jnp.int32)
    run = lambda *inputs: jnp.sum(ssd_blocks(*inputs, segment_ids, block_len=T))
    text = optimized_jit(jax.grad(run, range(5))).lower(*given).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    inside = [c for c in text.split("\n\n") if c.lstrip("%").split(" ")[0] in bodies]
    assert len(inside) == len(bodies) == 2  # forward and backward
    copies = re.compile(rf"f32\[1,{blocks},{N},22\]\S* copy")
    assert not any(copies.search(body) for body in inside)


def test_bfloat16_operands_stay_near():
    half = {n: a.astype(jnp.bfloat16) if n in "xBC" else a for n, a in INPUTS.items()}
    y = blockwise(*half.values(), SEGMENTS, block_len=8)
    assert y.dtype == jnp.float32
    assert 1e-5 < relative_error(y, oracles.ssd(*INPUTS.values(), SEGMENTS)) < 3e-2


convolve = quick_jit(causal_conv_silu)


@given(segment_rows(11), st.integers(0, 9))
def test_convolution_sees_its_own_segment(segment_ids, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (np.float32(rng.normal(size=s)) for s in ((2, 11, 3), (4, 3), (3,)))
    out = convolve(x, weight, bias, segment_ids)
    assert relative_error(out, oracles.causal_conv_silu(x, weight, bias, segment_ids)) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3])
def test_convolution_of_rows_shorter_than_its_taps(length):
    x, weight, bias = (np.float32(rng.normal(size=s)) for s in ((2, length, 3), (4, 3), (3,)))
    segment_ids = np.ones((2, length), np.int32)
    out = causal_conv_silu(x, weight, bias, segment_ids)
    assert relative_error(out, oracles.causal_conv_silu(x, weight, bias, segment_ids)) < 1e-6


def test_gradients_of_the_convolution():
    """Equal those of the same sum written with one matrix per tap, in float64."""
    segment_ids = np.stack([np.repeat([1, 2, 0], [2, 5, 4]), np.repeat([3, 4, 5], [1, 9, 1])])
    rng = np.random.default_rng(0)
    shapes = (2, 11, 3), (4, 3), (3,), (2, 11, 3)
    x, weight, bias, cotangent = (np.float32(rng.normal(size=s)) for s in shapes)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    taps = np.stack([same & np.eye(11, k=-back, dtype=bool) for back in range(4)])

    def plain(x, weight, bias):
        with jax.numpy_dtype_promotion("standard"):
            moved = jnp.einsum("wbls,bsc->wblc", taps.astype(x.dtype), x)
            out = bias[None, None] + jnp.einsum("wblc,wc->blc", moved, weight[::-1])
            return jnp.sum(out * jax.nn.sigmoid(out) * cotangent)

    def ours(*inputs):
        return jnp.sum(causal_conv_silu(*inputs, np.int32(segment_ids)) * cotangent)

    found = quick_jit(jax.grad(ours, (0, 1, 2)))(x, weight, bias)
    with jax.enable_x64(True):
        wanted = jax.grad(plain, (0, 1, 2))(*map(np.float64, (x, weight, bias)))
    for ours, theirs in zip(found, wanted):
        assert relative_error(ours, np.asarray(theirs)) < 1e-6
