"""Causal, windowed multi-head attention over packed rows, by blocks of queries."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.cache import KVCache, read, ring, write
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
        out_BLHK = attention(
            q, k, v, segment_ids_BL,
            window=self.stage.window_size, block_len=self.compute.attention_block_len,
        )  # fmt: skip
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
        size = cache.k.shape[3]
        slot_R, slot_M = positions_R % size, jnp.arange(size, dtype=jnp.int32)
        newest = (*at, slice(None), slot_R)
        cache = KVCache(write(cache.k, newest, k[:, 0]), write(cache.v, newest, v[:, 0]))
        keys, values = read(cache.k, at), read(cache.v, at)
        # slot m holds the newest position that is m mod size; there may not have been one yet
        filled_RM = (positions_R[:, None] - slot_M[None, :]) % size <= positions_R[:, None]
        scores_RHM = jnp.einsum("rhk,rhmk->rhm", q[:, 0], keys, preferred_element_type=jnp.float32)
        scores_RHM = jnp.where(filled_RM[:, None], scores_RHM / math.sqrt(q.shape[-1]), -jnp.inf)
        weights_RHM = jax.nn.softmax(scores_RHM, axis=-1).astype(values.dtype)
        out_RHK = jnp.einsum("rhm,rhmk->rhk", weights_RHM, values)
        return self.out_proj(out_RHK.reshape(x_R1D.shape)), cache
