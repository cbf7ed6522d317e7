"""Causal, windowed multi-head attention over packed rows, by blocks of queries."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.cache import KVCache, read, ring, write
from hnet.nn.kernels.spread import on_each_device
from hnet.nn.kernels.table import kernel
from hnet.nn.layers import linear, rotary, segment_positions

MAX_BLOCKS = 16  # query blocks are unrolled in the compiled program, so their number is bounded


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
    block_len: int = 256,
) -> jax.Array:
    """`attention_reference` block by block: keys no query of a block may see are never read.

    Scores are recomputed in the backward pass, so memory is linear in L for a window.
    """
    L = q_BLHK.shape[1]
    block_len = max(block_len, -(-L // MAX_BLOCKS))
    if L <= block_len:
        return attention_reference(q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, window=window)
    out = []
    for start in range(0, L, block_len):
        end = min(start + block_len, L)
        first = 0 if window < 0 else max(0, start - window)

        def block(q, k, v, s, offset=start - first):
            return attention_reference(q, k, v, s, window=window, offset=offset)

        one_block = jax.checkpoint(block)
        keys = slice(first, end)
        out.append(
            one_block(
                q_BLHK[:, start:end], k_BLHK[:, keys], v_BLHK[:, keys], segment_ids_BL[:, keys]
            )
        )
    return jnp.concatenate(out, axis=1)


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
        self.Wqkv = linear(D, 3 * D, dtype=dtype, rngs=rngs)
        self.out_proj = linear(D, D, std=out_std, dtype=dtype, rngs=rngs)

    def qkv(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, ...]:
        """Rotated queries and keys, and values, each (B, L, H, K)."""
        B, L, _ = x_BLD.shape
        qkv = self.Wqkv(x_BLD).reshape(B, L, 3, self.stage.num_heads, -1)
        q, k = (rotary(qkv[:, :, i], positions_BL, self.stage.rotary_emb_dim) for i in (0, 1))
        return q, k, qkv[:, :, 2]

    def attend(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The output, and the keys and values (B, L, H, K) it was made of."""
        q, k, v = self.qkv(x_BLD, segment_positions(segment_ids_BL))
        inputs, window = (q, k, v, segment_ids_BL), self.stage.window_size
        if other := kernel("attention_backend", self.compute):
            axes = ("BLHK", "BLHK", "BLHK", "BL")
            out_BLHK = on_each_device(partial(other, window=window), axes, "BLHK", *inputs)
        else:
            block_len = self.compute.attention_block_len
            out_BLHK = attention(*inputs, window=window, block_len=block_len)
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
