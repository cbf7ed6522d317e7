"""Causal, windowed multi-head attention over packed rows, by blocks of queries."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.cost import trips
from hnet.nn.cache import KVCache, read, ring, write
from hnet.nn.kernels.spread import on_each_device
from hnet.nn.kernels.table import kernel
from hnet.nn.layers import fused_linear, linear, rotary, segment_positions


def attention_reference(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    window: int = -1,
    offset: int = 0,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over the keys that a query may see, in one block.

    A query at i sees the keys j with i - window <= j <= i (all j <= i if window is -1) in its own
    segment. `q_BLHK` may be a slice of the rows starting at `offset`; keys start at 0.
    """
    query_index = offset + jnp.arange(q_BLHK.shape[1], dtype=jnp.int32)[:, None]
    key_index = jnp.arange(k_BLHK.shape[1], dtype=jnp.int32)[None, :]
    visible_LM = key_index <= query_index
    if window >= 0:
        visible_LM &= key_index >= query_index - window
    segment_q = jax.lax.slice_in_dim(segment_ids_BL, offset, offset + q_BLHK.shape[1], axis=1)
    visible_BLM = visible_LM[None] & (segment_q[:, :, None] == segment_ids_BL[:, None, :])
    scores_BHLM = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK, preferred_element_type=jnp.float32)
    scores_BHLM = scores_BHLM / math.sqrt(q_BLHK.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible_BLM[:, None], scores_BHLM, -jnp.inf), axis=-1)
    return jnp.einsum("bhlm,bmhk->blhk", weights.astype(v_BLHK.dtype), v_BLHK)


def attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    window: int = -1,
    block_len: int = 128,
) -> jax.Array:
    """`attention_reference` block by block, for rows in which equal neighbours are a segment.

    Blocks of keys that no query of a block may see, for causality, window or segments, are never
    computed, so the cost of a row follows its segments (arXiv 2205.14135, with bounds that are read
    at run time). The backward pass computes scores again: memory is linear in L.
    """
    B, L, H, _ = q_BLHK.shape
    T = min(block_len, L)
    padded = -(-L // T) * T
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
    """Blocks of keys that a block of queries sees on average in a row of one segment."""
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
    """Scores are computed keys first, and dq with its channels first: then none of the products
    contracts the rows of its left operand, which XLA on a CPU does slowly."""
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
    """The lowest of the rows. Under vmap it is that of all copies, so that they share a loop."""
    return jnp.min(first_BN, axis=0)


@_first_key_block.def_vmap
def _(size, _batched, first_SBN):
    return _first_key_block(first_SBN.reshape(-1, first_SBN.shape[-1])), False


def _first_blocks(first_BL: jax.Array, T: int) -> jax.Array:
    """The first block of keys that each block of queries sees: the one its first query sees."""
    return _first_key_block(first_BL.reshape(len(first_BL), -1, T)[:, :, 0]) // T


def _loop(first_block, i, body, carry):
    if len(first_block) == 1:  # nothing to skip: no loop in the program
        return body(0, carry)
    return jax.lax.fori_loop(first_block[i], i + 1, body, carry)


def _visible(first_BT, i, j, T):
    """Which keys of block j the queries of block i see, (B, T, T)."""
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


def cached_attention(
    q_RHK: jax.Array, cache: KVCache, at: tuple, positions_R: jax.Array, *, window: int
) -> jax.Array:
    """`attention_reference` for the newest position of R rows, whose key is in the cache already.

    Blocks of slots are read one by one with a running softmax, and only as many as the longest of
    the rows has filled, so that the cost follows the length and not the room.
    """
    blocks, T = cache.k.shape[2], cache.k.shape[4]
    filled = jnp.minimum(jnp.max(positions_R) // T + 1, blocks)
    visible = positions_R if window < 0 else jnp.minimum(positions_R, window)

    def block(j, carry):
        max_RH, sum_RH, out_RHK = carry
        keys, values = (read(a, (*at, j)) for a in cache)
        age_RT = (positions_R[:, None] - (j * T + jnp.arange(T))[None, :]) % (blocks * T)
        scores_RHT = jnp.einsum("rhk,rhtk->rht", q_RHK, keys, preferred_element_type=jnp.float32)
        scores_RHT = jnp.where(
            (age_RT <= visible[:, None])[:, None], scores_RHT / math.sqrt(q_RHK.shape[-1]), -jnp.inf
        )
        new_max_RH = jnp.maximum(max_RH, jnp.max(scores_RHT, axis=-1))
        weights_RHT = jnp.exp(scores_RHT - new_max_RH[..., None])
        shrink_RH = jnp.exp(max_RH - new_max_RH)
        added_RHK = jnp.einsum(
            "rht,rhtk->rhk", weights_RHT.astype(values.dtype), values,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        sum_RH = sum_RH * shrink_RH + jnp.sum(weights_RHT, axis=-1)
        return new_max_RH, sum_RH, out_RHK * shrink_RH[..., None] + added_RHK

    lowest_RH = jnp.full(q_RHK.shape[:2], jnp.finfo(jnp.float32).min)
    nothing = (lowest_RH, jnp.zeros_like(lowest_RH), jnp.zeros(q_RHK.shape, jnp.float32))
    _, sum_RH, out_RHK = jax.lax.fori_loop(0, filled, block, nothing)
    return (out_RHK / sum_RH[..., None]).astype(q_RHK.dtype)


class Attention(nnx.Module):
    """The official CausalMHA: fused Wqkv, partial rotary, no biases."""

    def __init__(self, config: HNetConfig, stage: StageConfig, *, out_std: float, rngs: nnx.Rngs):
        D, dtype = stage.d_model, config.compute.dtype
        self.stage, self.compute = stage, config.compute
        self.Wqkv = linear(D, 3 * D, "embed_fused out", dtype=dtype, rngs=rngs)
        self.out_proj = linear(D, D, "heads out", std=out_std, dtype=dtype, rngs=rngs)

    def qkv(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, ...]:
        """Rotated queries and keys, and values, each (B, L, H, K)."""
        B, L, _ = x_BLD.shape
        H, dim = self.stage.num_heads, self.stage.rotary_emb_dim
        parts = fused_linear(self.Wqkv, x_BLD, (self.stage.d_model,) * 3, heads=H)
        q, k, v = (part.reshape(B, L, H, -1) for part in parts)
        return rotary(q, positions_BL, dim), rotary(k, positions_BL, dim), v

    def attend(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The output, and the keys and values (B, L, H, K) it was made of."""
        q, k, v = self.qkv(x_BLD, segment_positions(segment_ids_BL))
        blocked = partial(attention, block_len=self.compute.attention_block_len)
        attend = kernel("attention_backend", self.compute) or blocked
        axes = ("BLHK", "BLHK", "BLHK", "BL")
        out_BLHK = on_each_device(
            partial(attend, window=self.stage.window_size), axes, "BLHK", q, k, v, segment_ids_BL
        )
        return self.out_proj(out_BLHK.reshape(x_BLD.shape)), k, v

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        return self.attend(x_BLD, segment_ids_BL)[0]

    def prefill(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, KVCache]:
        """`__call__`, and the cache (of one layer) of rows that end at `lengths_B`."""
        out_BLD, k, v = self.attend(x_BLD, segment_ids_BL)
        window = self.stage.window_size
        size = max_len if window < 0 else min(max_len, window + 1)
        return out_BLD, KVCache(ring(k, lengths_B, size), ring(v, lengths_B, size))

    def step(
        self, x_R1D: jax.Array, cache: KVCache, at: tuple, positions_R: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """One position of R rows; `positions_R` counts the positions each has had before."""
        q, k, v = self.qkv(x_R1D, positions_R[:, None])
        blocks, T = cache.k.shape[2], cache.k.shape[4]
        slot_R = positions_R % (blocks * T)
        newest = (*at, slot_R // T, slice(None), slot_R % T)
        cache = KVCache(write(cache.k, newest, k[:, 0]), write(cache.v, newest, v[:, 0]))
        out_RHK = cached_attention(q[:, 0], cache, at, positions_R, window=self.stage.window_size)
        return self.out_proj(out_RHK.reshape(x_R1D.shape)), cache
