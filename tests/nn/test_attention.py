"""Block attention against a plain loop: windows, segments, ragged blocks, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.nn.attention import (
    attention_by_queries,
    attention_reference,
    grouped_attention,
)
from hnet.nn.kernels.attention_blocks import attention_blocks
from tests import oracles
from tests.golden_data import relative_error
from tests.networks import quick_jit

B, L, H, K = 2, 23, 3, 5
rng = np.random.default_rng(0)
Q, KEYS, V = (np.float32(rng.normal(size=(B, L, H, K))) for _ in range(3))
SEGMENTS = np.stack([np.repeat([1, 2], [9, 14]), np.repeat([3, 1, 0], [1, 18, 4])]).astype(np.int32)
attend = quick_jit(attention_blocks, static_argnames=("window", "block_len"))


@pytest.mark.parametrize("window", [-1, 0, 3, 22, 99])
@pytest.mark.parametrize("block_len", [5, 20])  # 20: two blocks of 16
def test_attention_is_softmax_over_what_is_visible(window, block_len):
    out = attend(Q, KEYS, V, SEGMENTS, window=window, block_len=block_len)
    assert relative_error(out, oracles.attention(Q, KEYS, V, SEGMENTS, window)) < 2e-6


@pytest.mark.parametrize("block_len", [5, 64])
@pytest.mark.parametrize("window", [-1, 3])
def test_gradients_of_blocks_are_those_of_the_reference(window, block_len):
    cotangent = np.float32(rng.normal(size=(B, L, H, K)))

    def gradients(f, **how):
        scalar = lambda q, k, v: jnp.sum(f(q, k, v, SEGMENTS, window=window, **how) * cotangent)
        return quick_jit(jax.grad(scalar, (0, 1, 2)))(Q, KEYS, V)

    for ours, whole in zip(
        gradients(attention_blocks, block_len=block_len), gradients(attention_reference)
    ):
        assert relative_error(ours, whole) < 1e-5


def test_keys_before_every_window_of_a_block_are_never_read():
    """A NaN in a key that is only masked would spread. The cost of a window is linear in L."""
    poisoned_K, poisoned_V = KEYS.copy(), V.copy()
    poisoned_K[:, :5] = poisoned_V[:, :5] = np.nan
    segments = np.ones((B, L), np.int32)
    out = attend(Q, poisoned_K, poisoned_V, segments, window=3, block_len=5)
    clean = attend(Q, KEYS, V, segments, window=3, block_len=5)
    assert np.all(np.isnan(out[:, :10]))
    assert np.array_equal(out[:, 10:], clean[:, 10:])


def test_keys_of_other_segments_are_never_read():
    """The cost of packed rows depends on their segments: here 1..9 and 10..23, blocks of 5."""
    poisoned_K, poisoned_V = KEYS.copy(), V.copy()
    poisoned_K[:, :5] = poisoned_V[:, :5] = np.nan
    segments = np.repeat(SEGMENTS[:1], B, axis=0)
    out = attend(Q, poisoned_K, poisoned_V, segments, block_len=5)
    clean = attend(Q, KEYS, V, segments, block_len=5)
    assert np.all(np.isnan(out[:, :9]))
    assert np.array_equal(out[:, 10:], clean[:, 10:])


def test_no_gradient_crosses_a_segment():
    of = lambda k: jnp.sum(attention_blocks(Q, k, V, SEGMENTS, block_len=5)[0, 9:])
    grad = quick_jit(jax.grad(of))
    assert np.all(grad(KEYS)[0, :9] == 0) and np.all(grad(KEYS)[0, 9:22] != 0)


def test_program_does_not_grow_with_the_row():
    def equations(length):
        q, segments = jnp.zeros((1, length, 1, 2)), jnp.ones((1, length), jnp.int32)
        grad = jax.grad(lambda q: jnp.sum(attention_blocks(q, q, q, segments, block_len=2)))
        return str(jax.make_jaxpr(grad)(q)).count(" = ")

    assert equations(8) == equations(64)


def test_copies_of_a_vmap_share_their_loops():
    """Each copy has its own segments; loops with different ends would run until the last ends."""
    segments = np.stack([SEGMENTS, SEGMENTS[::-1]])

    def gradient(segments):
        return jax.grad(lambda q: jnp.sum(attention_blocks(q, KEYS, V, segments, block_len=5)))(Q)

    together = quick_jit(jax.vmap(gradient))(segments)
    assert relative_error(together, np.stack([gradient(s) for s in segments])) < 1e-6
    assert "reduce_or" not in str(jax.make_jaxpr(jax.vmap(gradient))(segments))


def test_large_scores_do_not_overflow():
    out = attend(100 * Q, 100 * KEYS, V, SEGMENTS, block_len=5)
    assert np.all(np.isfinite(out))


BIAS, SINK = np.float32(rng.normal(size=(B, L))), np.float32(rng.normal(size=H))
OPTIONS = [
    {"causal": False}, {"causal": False, "window": 3}, {"soft_cap": 1.5}, {"bias": BIAS},
    {"sink": SINK}, {"bias": BIAS, "sink": SINK, "soft_cap": 1.5, "causal": False, "window": 6},
]  # fmt: skip


EVERY_OPTION = [(options, block_len) for options in OPTIONS for block_len in (5, 23, 64)]
SOME_OPTIONS = [pair for pair in EVERY_OPTION if pair[1] == 5 or pair[0] is OPTIONS[-1]]


@pytest.mark.few("options, block_len", SOME_OPTIONS, EVERY_OPTION)
def test_options_are_those_of_the_loop_and_of_one_block(options, block_len):
    options = dict(options)
    more = options.pop("bias", None), options.pop("sink", None)
    wanted = oracles.attention(
        Q, KEYS, V, SEGMENTS, options.get("window", -1), causal=options.get("causal", True),
        bias_BL=more[0], sink_H=more[1], cap=options.get("soft_cap", 0.0),
    )  # fmt: skip

    def run(q, k, v, *more):
        return attention_by_queries(q, k, v, SEGMENTS, *more, block_len=block_len, **options)

    assert relative_error(quick_jit(run)(Q, KEYS, V, *more), wanted) < 2e-6
    cotangent = np.float32(rng.normal(size=(B, L, H, K)))
    given = [i for i, a in enumerate((Q, KEYS, V, *more)) if a is not None]

    def gradients(f):
        return quick_jit(jax.grad(lambda *a: jnp.sum(f(*a) * cotangent), given))(Q, KEYS, V, *more)

    whole = lambda q, k, v, *more: attention_reference(q, k, v, SEGMENTS, *more, **options)
    for ours, reference in zip(gradients(run), gradients(whole)):
        assert np.any(reference != 0) and relative_error(ours, reference) < 1e-5


def test_memory_of_blocks_of_queries_is_linear_in_the_row():
    """No array is as large as all scores, forward or backward."""
    length = 64
    q, segments = jnp.zeros((1, length, 1, 2)), jnp.ones((1, length), jnp.int32)

    def scalar(q):
        return jnp.sum(attention_by_queries(q, q, q, segments, block_len=4, soft_cap=2.0))

    text = jax.jit(jax.grad(scalar)).lower(q).as_text()
    assert "4x64x" in text and "64x64x" not in text and "16x4x64x" not in text


GROUPS = np.sort(rng.integers(0, 6, (B, L)), axis=1).astype(np.int32)
MEMORY_GROUPS = np.repeat(np.int32([[0, 1, 2, 3, 4, 5, -1]] * B), 2, axis=1)  # two vectors each


@pytest.mark.parametrize("relation", ["equal", "last_closed"])
@pytest.mark.parametrize("window", [1, 2, -1])
def test_groups_are_attended_as_a_loop_does(relation, window):
    keys, values = (np.float32(rng.normal(size=(B, 14, H, K))) for _ in range(2))
    by_group = np.stack([np.repeat([1, 2], [6, 8]), np.ones(14)]).astype(np.int32)
    segments = np.where(np.arange(B)[:, None] == 1, 1, 1 + (GROUPS > 2)).astype(np.int32)
    same = segments[:, :, None] == by_group[:, None, :]
    out = quick_jit(grouped_attention, static_argnames=("relation", "window"))(
        Q, keys[:, :, None], values[:, :, None], GROUPS, MEMORY_GROUPS, segments, by_group,
        relation=relation, window=window,
    )  # fmt: skip
    wanted = oracles.grouped_attention(
        Q, keys, values, GROUPS, MEMORY_GROUPS, same, relation, window
    )
    assert relative_error(out, wanted) < 2e-6
    assert np.any(np.all(np.asarray(out) == 0, axis=(2, 3))) == (relation == "last_closed")


def test_an_unknown_relation_raises():
    with pytest.raises(ValueError, match="relation='next': use 'equal' or 'last_closed'"):
        grouped_attention(Q, KEYS[:, :, None], V[:, :, None], GROUPS, GROUPS, relation="next")


def test_a_query_that_sees_nothing_has_a_finite_gradient():
    nothing = np.full((B, L), -1, np.int32)
    values = V[:, :, None]
    scalar = lambda q, k: jnp.sum(
        grouped_attention(q, k, values, GROUPS, nothing, relation="equal")
    )
    for grad in jax.grad(scalar, (0, 1))(Q, KEYS[:, :, None]):
        assert np.all(grad == 0)
