"""The gated delta rule: blocks, the sequential reference and a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.nn.delta import gated_delta, gated_delta_reference, unit_lower_inverse
from tests import oracles
from tests.golden_data import relative_error
from tests.networks import quick_jit

B, L, H, K, V = 2, 29, 3, 5, 7
rng = np.random.default_rng(0)


def unit(a):
    return np.float32(a / np.linalg.norm(a, axis=-1, keepdims=True))


INPUTS = {
    "q": unit(rng.normal(size=(B, L, H, K))),
    "k": unit(rng.normal(size=(B, L, H, K))),
    "v": np.float32(rng.normal(size=(B, L, H, V))),
    # one head forgets slowly, one quickly, one at once
    "log_alpha": np.float32(-rng.uniform(0, 1, (B, L, H)) * [0.01, 1, 100]),
    "beta": np.float32(rng.uniform(0, 1, (B, L, H))),
}
SEGMENTS = np.stack([np.repeat([1, 2, 3], [9, 7, 13]), np.repeat([1, 0], [25, 4])]).astype(np.int32)
blockwise = quick_jit(lambda *a, block_len: gated_delta(*a, block_len=block_len)[0],
                      static_argnames="block_len")  # fmt: skip


@pytest.mark.parametrize("block_len", [1, 4, 8, 11, 64])
def test_blocks_are_the_recurrence(block_len):
    y = blockwise(*INPUTS.values(), SEGMENTS, block_len=block_len)
    assert relative_error(y, oracles.gated_delta(*INPUTS.values(), SEGMENTS)) < 2e-6


def test_sequential_reference_is_the_recurrence():
    y = quick_jit(gated_delta_reference)(*INPUTS.values(), SEGMENTS)
    assert relative_error(y, oracles.gated_delta(*INPUTS.values(), SEGMENTS)) < 2e-6


@pytest.mark.parametrize("block_len", [8, 64])
def test_gradients_are_those_of_the_recurrence(block_len):
    cotangents = np.float32(rng.normal(size=(7, B, L, H, V)))

    def gradients(f):
        def of(cotangent):
            scalar = lambda *inputs: jnp.sum(f(*inputs, SEGMENTS) * cotangent)
            return jax.grad(scalar, range(5))(*INPUTS.values())

        return quick_jit(jax.vmap(of))(cotangents)

    ours = gradients(lambda *inputs: gated_delta(*inputs, block_len=block_len)[0])
    for name, grad, reference in zip(INPUTS, ours, gradients(gated_delta_reference)):
        # head by head, so that a large head does not hide errors of another
        grad, reference = np.moveaxis(grad, 3, 0), np.moveaxis(reference, 3, 0)
        assert max(map(relative_error, grad, reference)) < 2e-5, name


@pytest.mark.parametrize("block_len", [8, 11])  # the segment starts a block, or lies inside one
def test_no_gradient_crosses_a_segment(block_len):
    cotangent = np.zeros((B, L, H, V), np.float32)
    cotangent[0, 16:] = 1  # the third segment of row 0

    def scalar(*inputs):
        return jnp.sum(gated_delta(*inputs, SEGMENTS, block_len=block_len)[0] * cotangent)

    for grad in quick_jit(jax.grad(scalar, range(5)))(*INPUTS.values()):
        assert np.all(grad[0, :16] == 0) and np.all(grad[1] == 0) and np.any(grad[0, 16:] != 0)


def test_causality_bit_for_bit():
    before = np.asarray(blockwise(*INPUTS.values(), SEGMENTS, block_len=8))
    for t in (3, 8, 20):
        changed = {name: a.copy() for name, a in INPUTS.items()}
        for a in changed.values():
            a[:, t:] *= np.float32(0.3)
        after = np.asarray(blockwise(*changed.values(), SEGMENTS, block_len=8))
        assert np.array_equal(before[:, :t].view(np.uint32), after[:, :t].view(np.uint32))
        assert np.all(np.any(before[:, t] != after[:, t], axis=(1, 2)))


def test_the_last_state_is_the_one_after_the_last_position():
    """For rows whose length is not a multiple of the block, in the last segment of the row."""
    *inputs, ids = (a[:1] for a in (*INPUTS.values(), SEGMENTS))
    _, state = gated_delta(*inputs, ids, block_len=8)
    probe = [np.concatenate([a, a[:, :1]], axis=1) for a in inputs]
    probe[3][:, -1] = probe[4][:, -1] = 0  # nothing is forgotten or written: y = state' q
    last = oracles.gated_delta(*probe, np.append(ids, ids[:, -1:], axis=1))[:, -1]
    read = np.einsum("bhkv,bhk->bhv", np.float64(state), probe[0][:, -1])
    assert relative_error(read, last) < 2e-6


def test_bfloat16_operands_stay_near():
    half = {n: a.astype(jnp.bfloat16) if n in "qkv" else a for n, a in INPUTS.items()}
    y = blockwise(*half.values(), SEGMENTS, block_len=8)
    assert y.dtype == jnp.float32
    assert 1e-5 < relative_error(y, oracles.gated_delta(*INPUTS.values(), SEGMENTS)) < 3e-2


@pytest.mark.parametrize("size", [1, 2, 13, 61])
def test_inverse_of_unit_lower_triangular_matrices(size):
    """All ones: the rule with equal keys and no forgetting; powers of this matrix reach 1e17."""
    lower = np.tril(rng.normal(size=(3, size, size)) / np.sqrt(size), -1)
    lower[0] = np.tril(np.ones((size, size)), -1)
    above = np.float32(np.triu(rng.normal(size=(3, size, size))))  # this triangle is not read
    found = np.asarray(quick_jit(unit_lower_inverse)(np.float32(lower) + above))
    wanted = np.linalg.inv(np.eye(size) + np.float32(lower))
    assert np.all(np.abs(found - wanted) < 2e-6 * np.abs(wanted).max(axis=(1, 2), keepdims=True))
    cotangent = np.float32(rng.normal(size=(3, size, size)))
    grad = quick_jit(jax.grad(lambda a: jnp.sum(unit_lower_inverse(a) * cotangent)))
    of_solve = lambda a: jnp.sum(jnp.linalg.inv(jnp.eye(size) + jnp.tril(a, -1)) * cotangent)
    cotangent = np.float64(cotangent)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wanted = np.asarray(jax.grad(of_solve)(np.float64(np.float32(lower))))
    assert np.abs(grad(np.float32(lower)) - wanted).max() <= 1e-5 * np.abs(wanted).max()
