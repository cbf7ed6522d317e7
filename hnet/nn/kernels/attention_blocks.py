"""Causal attention in blocks with a derivative by hand: array code, made for CPUs.

The plain form is `hnet.nn.attention.attention_reference`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hnet.cost import trips
from hnet.nn.layers import segment_positions


def attention_blocks(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    window: int = -1,
    block_len: int = 128,
) -> jax.Array:
    """Blockwise `attention_reference`; equal neighbouring segment ids are one segment.

    Blocks of keys that are invisible to a block of queries (causality, window or segments) are
    skipped, so the cost of a row depends on its segments (arXiv 2205.14135, with loop bounds that
    are known at run time). The backward pass recomputes scores: memory is linear in L.
    """
    B, L, H, _ = q_BLHK.shape
    blocks = -(-L // block_len)
    # equal blocks of a multiple of 8, so that little of the last one is unused
    T = min(L, block_len, -(-L // (blocks * 8)) * 8)
    padded = blocks * T
    index_L = jnp.arange(padded, dtype=jnp.int32)
    segment_ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, padded - L)), constant_values=-1)
    first_BL = index_L[None, :] - segment_positions(segment_ids_BL)
    if window >= 0:
        first_BL = jnp.maximum(first_BL, index_L[None, :] - window)

    def heads_first(x_BLHK):
        return jnp.pad(x_BLHK, ((0, 0), (0, padded - L), (0, 0), (0, 0))).swapaxes(1, 2)

    q_BHLK, k_BHLK, v_BHLK = map(heads_first, (q_BLHK, k_BLHK, v_BLHK))
    scaled_BHLK = q_BHLK * jnp.asarray(1 / math.sqrt(q_BHLK.shape[-1]), q_BHLK.dtype)
    with trips(_mean_trips(padded // T, T, window)):
        return _by_blocks(scaled_BHLK, k_BHLK, v_BHLK, first_BL, T).swapaxes(1, 2)[:, :L]


def _mean_trips(blocks: int, T: int, window: int) -> float:
    """Mean number of key blocks per query block in a row of one segment."""
    first = (0 if window < 0 else max(0, i * T - window) // T for i in range(blocks))
    return sum(i + 1 - j for i, j in enumerate(first)) / blocks


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(q_BHLK, k_BHLK, v_BHLK, first_BL, T):
    """softmax(q k') v over the keys from `first_BL` to the query itself; T divides L."""
    return _by_blocks_fwd(q_BHLK, k_BHLK, v_BHLK, first_BL, T)[0]


def _by_blocks_fwd(q_BHLK, k_BHLK, v_BHLK, first_BL, T):
    first_block = _first_blocks(first_BL, T)
    B, H, L, K = q_BHLK.shape

    def query_block(i):
        q_BHTK, first_BT = _cut(q_BHLK, i, T), _cut(first_BL, i, T, axis=1)

        def key_block(j, carry):
            max_BHT, sum_BHT, out_BHTK = carry
            scores_BHTM = _einsum("bhtk,bhmk->bhtm", q_BHTK, _cut(k_BHLK, j, T))
            visible_BTM = _visible(first_BT, i, j, T)
            scores_BHTM = jnp.where(visible_BTM[:, None], scores_BHTM, -jnp.inf)
            new_max_BHT = jnp.maximum(max_BHT, jnp.max(scores_BHTM, axis=-1))
            weights_BHTM = jnp.exp(scores_BHTM - new_max_BHT[..., None])
            shrink_BHT = jnp.exp(max_BHT - new_max_BHT)
            added_BHTK = _einsum(
                "bhtm,bhmk->bhtk", weights_BHTM.astype(v_BHLK.dtype), _cut(v_BHLK, j, T)
            )
            sum_BHT = sum_BHT * shrink_BHT + jnp.sum(weights_BHTM, axis=-1)
            return new_max_BHT, sum_BHT, out_BHTK * shrink_BHT[..., None] + added_BHTK

        lowest_BHT = jnp.full((B, H, T), jnp.finfo(jnp.float32).min)
        nothing = (lowest_BHT, jnp.zeros((B, H, T)), jnp.zeros((B, H, T, K)))
        max_BHT, sum_BHT, out_BHTK = _loop(first_block, i, key_block, nothing)
        out_BHTK = (out_BHTK / sum_BHT[..., None]).astype(q_BHLK.dtype)
        return out_BHTK, max_BHT + jnp.log(sum_BHT)

    out, log_sum = jax.lax.map(query_block, jnp.arange(L // T, dtype=jnp.int32))
    out_BHLK, log_sum_BHL = (
        jnp.moveaxis(a, 0, 2).reshape(B, H, L, *a.shape[4:]) for a in (out, log_sum)
    )
    return out_BHLK, (q_BHLK, k_BHLK, v_BHLK, first_BL, out_BHLK, log_sum_BHL)


def _by_blocks_bwd(T, saved, grad_BHLK):
    """Scores have the keys first and dq its channels first, so that no product contracts the rows
    of its left operand, which is slow in XLA's CPU backend."""
    q_BHLK, k_BHLK, v_BHLK, first_BL, out_BHLK, log_sum_BHL = saved
    first_block = _first_blocks(first_BL, T)
    grad_dot_out_BHL = jnp.sum(
        grad_BHLK.astype(jnp.float32) * out_BHLK.astype(jnp.float32), axis=-1
    )
    dtype, k_BHKL = q_BHLK.dtype, jax.lax.optimization_barrier(k_BHLK.swapaxes(2, 3))

    def query_block(carry, i):
        q, grad = _cut(q_BHLK, i, T), _cut(grad_BHLK, i, T)
        log_sum, grad_dot_out = _cut(log_sum_BHL, i, T), _cut(grad_dot_out_BHL, i, T)
        first_BT = _cut(first_BL, i, T, axis=1)

        def key_block(j, carry):
            dq_BHKT, dk_BHLK, dv_BHLK = carry
            k, v = _cut(k_BHLK, j, T), _cut(v_BHLK, j, T)
            scores_BHMT = _einsum("bhmk,bhtk->bhmt", k, q)
            visible_BMT = _visible(first_BT, i, j, T).swapaxes(1, 2)
            weights_BHMT = jnp.exp(
                jnp.where(visible_BMT[:, None], scores_BHMT - log_sum[:, :, None], -jnp.inf)
            )
            dv = _einsum("bhmt,bhtk->bhmk", weights_BHMT.astype(dtype), grad)
            dweights_BHMT = _einsum("bhmk,bhtk->bhmt", v, grad)
            dscores_BHMT = weights_BHMT * (dweights_BHMT - grad_dot_out[:, :, None])
            dscores_BHMT = dscores_BHMT.astype(dtype)
            dk = _einsum("bhmt,bhtk->bhmk", dscores_BHMT, q)
            dq_BHKT += _einsum("bhkm,bhmt->bhkt", _cut(k_BHKL, j, T, axis=3), dscores_BHMT)
            return dq_BHKT, _add_to(dk_BHLK, dk, j, T), _add_to(dv_BHLK, dv, j, T)

        nothing = jnp.zeros(q.swapaxes(2, 3).shape)
        dq_BHKT, *carry = _loop(first_block, i, key_block, (nothing, *carry))
        return tuple(carry), jax.lax.optimization_barrier(dq_BHKT).swapaxes(2, 3)

    zeros = jnp.zeros(k_BHLK.shape)
    blocks = jnp.arange(q_BHLK.shape[2] // T, dtype=jnp.int32)
    (dk_BHLK, dv_BHLK), dq = jax.lax.scan(query_block, (zeros, zeros), blocks)
    dq_BHLK = jnp.moveaxis(dq, 0, 2).reshape(q_BHLK.shape)
    return dq_BHLK.astype(dtype), dk_BHLK.astype(dtype), dv_BHLK.astype(dtype), None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)


@jax.custom_batching.custom_vmap
def _first_key_block(first_BN: jax.Array) -> jax.Array:
    """Minimum over rows. Under vmap: over all batch elements too, so that they share one loop."""
    return jnp.min(first_BN, axis=0)


@_first_key_block.def_vmap
def _(size, _batched, first_SBN):
    return _first_key_block(first_SBN.reshape(-1, first_SBN.shape[-1])), False


def _first_blocks(first_BL: jax.Array, T: int) -> jax.Array:
    """First key block that each query block sees, which is that of its first query."""
    return _first_key_block(first_BL.reshape(len(first_BL), -1, T)[:, :, 0]) // T


def _loop(first_block, i, body, carry):
    if len(first_block) == 1:  # one block: call the body without a loop
        return body(0, carry)
    return jax.lax.fori_loop(first_block[i], i + 1, body, carry)


def _visible(first_BT, i, j, T):
    """Keys of block j that the queries of block i see, bool (B, T, T)."""
    index_T = jnp.arange(T, dtype=jnp.int32)
    key_T, query_T = j * T + index_T, i * T + index_T
    causal_TM = key_T[None, :] <= query_T[:, None]
    return causal_TM[None] & (key_T[None, None, :] >= first_BT[:, :, None])


def _cut(a, i, T, axis=2):
    return jax.lax.dynamic_slice_in_dim(a, i * T, T, axis)


def _add_to(a_BHLK, new_BHTK, j, T):
    return jax.lax.dynamic_update_slice_in_dim(a_BHLK, _cut(a_BHLK, j, T) + new_BHTK, j * T, 2)


def _einsum(spec, *operands):
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)
