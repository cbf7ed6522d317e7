"""Causal, windowed multi-head attention over packed rows, by blocks of queries."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
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

    def __init__(
        self, config: HNetConfig, stage: StageConfig, *, out_std: float, rngs: nnx.Rngs
    ):
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

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        q, k, v = self.qkv(x_BLD, segment_positions(segment_ids_BL))
        out_BLHK = attention(
            q, k, v, segment_ids_BL,
            window=self.stage.window_size, block_len=self.compute.attention_block_len,
        )  # fmt: skip
        return self.out_proj(out_BLHK.reshape(x_BLD.shape))
