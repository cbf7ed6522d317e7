"""Block attention against a plain loop: windows, segments, ragged blocks, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from golden_data import relative_error
from networks import quick_jit

from hnet.nn.attention import MAX_BLOCKS, attention, attention_reference

B, L, H, K = 2, 23, 3, 5
rng = np.random.default_rng(0)
Q, KEYS, V = (np.float32(rng.normal(size=(B, L, H, K))) for _ in range(3))
SEGMENTS = np.stack([np.repeat([1, 2], [9, 14]), np.repeat([3, 1, 0], [1, 18, 4])]).astype(np.int32)
attend = quick_jit(attention, static_argnames=("window", "block_len"))


@pytest.mark.parametrize("window", [-1, 0, 3, 22, 99])
@pytest.mark.parametrize("block_len", [5, 64])
def test_attention_is_softmax_over_what_is_visible(window, block_len):
    out = attend(Q, KEYS, V, SEGMENTS, window=window, block_len=block_len)
    assert relative_error(out, oracles.attention(Q, KEYS, V, SEGMENTS, window)) < 2e-6


@pytest.mark.parametrize("window", [-1, 3])
def test_gradients_of_blocks_are_those_of_one_block(window):
    cotangent = np.float32(rng.normal(size=(B, L, H, K)))

    def gradients(f, **how):
        scalar = lambda q, k, v: jnp.sum(f(q, k, v, SEGMENTS, window=window, **how) * cotangent)
        return quick_jit(jax.grad(scalar, (0, 1, 2)))(Q, KEYS, V)

    for ours, whole in zip(gradients(attention, block_len=5), gradients(attention_reference)):
        assert relative_error(ours, whole) < 1e-5


def test_keys_before_every_window_of_a_block_are_never_read():
    """A NaN in a key that is only masked would spread; the cost of a window is linear in L."""
    poisoned_K, poisoned_V = KEYS.copy(), V.copy()
    poisoned_K[:, :7] = poisoned_V[:, :7] = np.nan
    segments = np.ones((B, L), np.int32)
    out = attend(Q, poisoned_K, poisoned_V, segments, window=3, block_len=5)
    clean = attend(Q, KEYS, V, segments, window=3, block_len=5)
    assert np.all(np.isnan(out[:, :10]))
    assert np.array_equal(out[:, 10:], clean[:, 10:])


@pytest.mark.parametrize("length", [16, 17, 97])
def test_number_of_blocks_in_the_program_is_bounded(length):
    q = jnp.zeros((1, length, 1, 2))
    segments = jnp.ones((1, length), jnp.int32)
    program = jax.make_jaxpr(lambda q: attention(q, q, q, segments, block_len=1))(q)
    blocks = str(program).count("remat")
    assert MAX_BLOCKS // 2 < blocks <= MAX_BLOCKS


def test_large_scores_do_not_overflow():
    out = attend(100 * Q, 100 * KEYS, V, SEGMENTS, block_len=5)
    assert np.all(np.isfinite(out))
