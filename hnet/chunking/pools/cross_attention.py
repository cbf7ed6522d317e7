"""A pool by cross-attention: k queries of a chunk read the chunk's positions."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.bounds import Count
from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids
from hnet.nn.attention import masked_attention
from hnet.nn.layers import RMSNorm, linear
from hnet.nn.parameters import parameter

LOWEST = jnp.finfo(jnp.float32).min


class CrossAttention(Pool):
    """q + attention(norm(q), norm(h)) for the k queries q of a chunk that ends.

    Queries are projections of the maximum over the chunk (arXiv 2412.09871, section 3.2;
    facebookresearch/blt), or learned vectors (Byte2Word, TFree-HAT). The reference adds q twice,
    in the layer and in its caller.

    A chunk has at most `max_chunk_len` positions, so both forms keep a window of positions: P of
    them in total, N queries, X channels of keys and values.
    """

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Cross-attention of k queries to the chunk's positions (BLT, Byte2Word, TFree-HAT)."""

        num_queries: Count = 1
        """k: number of vectors per chunk"""
        num_heads: Count = 4
        """number of attention heads"""
        queries: Literal["max", "learned"] = "max"
        """queries: projections of the maximum over the chunk's positions, or learned vectors"""
        vectors: Literal["concat", "tokens"] = "concat"
        """form of the k vectors: one position of the main network, k times as wide, or k
        positions"""
        window: Count = 1
        """number of chunks whose positions are read, the own one included"""
        reference_doubled_residual: bool = False
        """query added twice, as the reference code does"""

        def problem_in(self, chunking):
            if chunking.max_chunk_len:
                return None
            return (
                "max_chunk_len=0 with pool='cross_attention', which keeps the positions of a "
                "chunk: use the length at which a boundary is forced, such as 32"
            )

        def problem_at_width(self, d_model):
            if d_model % self.num_heads == 0:
                return None
            return f"num_heads={self.num_heads} does not divide d_model={d_model}: use a divisor"

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        D, k = place.d_model, config.num_queries
        self.d_model, self.room = D, config.window * place.chunking.max_chunk_len
        make = lambda width, std: linear(
            D, width, "embed_fused out", std=std, dtype=jnp.float32, rngs=rngs
        )
        if config.queries == "max":
            self.queries = make(k * D, D**-0.5)
        else:
            self.query = parameter(jax.random.normal(rngs.params(), (k * D,)), "channels")
        self.query_norm, self.norm = RMSNorm(D), RMSNorm(D)
        self.Wq, self.Wkv = make(D, D**-0.5), make(2 * D, D**-0.5)
        self.out_proj = make(D, D**-0.5)

    @classmethod
    def d_out(cls, config, place):
        return place.d_model * config.num_queries // cls.num_slots(config)

    @classmethod
    def num_slots(cls, config):
        return config.num_queries if config.vectors == "tokens" else 1

    def keys(self, h_BLD: jax.Array) -> jax.Array:
        """Keys and values (B, L, X = 2 D) of positions."""
        return self.Wkv(self.norm(h_BLD))

    def attend(self, max_RD: jax.Array, kv_RPX: jax.Array, visible_RP: jax.Array) -> jax.Array:
        """Vectors (R, k D) of chunks with this maximum, from the visible positions."""
        (R, D), N, H = max_RD.shape, self.config.num_queries, self.config.num_heads
        if self.config.queries == "max":
            q_RND = self.queries(max_RD[:, None]).reshape(R, N, D)
        else:
            q_RND = jnp.broadcast_to(self.query[...].reshape(1, N, D), (R, N, D))
        by_head = lambda a: a.reshape(R, -1, H, D // H)
        q, k, v = map(by_head, (self.Wq(self.query_norm(q_RND)), *jnp.split(kv_RPX, 2, axis=-1)))
        visible_RNP = jnp.broadcast_to(visible_RP[:, None], (R, N, visible_RP.shape[1]))
        out_RND = self.out_proj(masked_attention(q, k, v, visible_RNP).reshape(R, N, D))
        times = 2 if self.config.reference_doubled_residual else 1
        return (times * q_RND + out_RND).reshape(R, N * D)

    # The state holds the last P positions: keys and values, and the number of each one's chunk, -1
    # for none; the number of the open chunk; and the maximum over its positions.

    def init(self, rows, d_model):
        return (
            jnp.zeros((rows, self.room, 2 * d_model), jnp.float32),
            jnp.full((rows, self.room), -1, jnp.int32),
            jnp.zeros((rows,), jnp.int32),
            jnp.full((rows, d_model), LOWEST),
        )

    def step(self, state, x):
        kv_RPX, chunk_RP, open_R, max_RD = state
        new_R1X = self.keys(x.h_RD[:, None])
        kv_RPX = jnp.concatenate([kv_RPX[:, 1:], new_R1X], axis=1)
        chunk_RP = jnp.concatenate([chunk_RP[:, 1:], open_R[:, None]], axis=1)
        max_RD = jnp.maximum(max_RD, x.h_RD)
        visible_RP = (chunk_RP >= 0) & (chunk_RP > open_R[:, None] - self.config.window)
        return (kv_RPX, chunk_RP, open_R, max_RD), self.attend(max_RD, kv_RPX, visible_RP)

    def restart(self, state, rows, d_model):
        kv_RPX, chunk_RP, open_R, max_RD = state
        return kv_RPX, chunk_RP, open_R + 1, jnp.full_like(max_RD, LOWEST)

    def __call__(self, rows, boundaries, slots):
        (B, L, _), ids_BL = rows.h_BLD.shape, rows.context.segment_ids_BL
        chunk_BL = chunk_ids(boundaries.boundary_mask_BL, ids_BL)
        age_P = jnp.arange(self.room, dtype=jnp.int32)[None, None]
        at_BM1 = slots.opened_at_BM[..., None]
        index_BMP = jnp.where(at_BM1 < L, at_BM1 - age_P, -1)
        index_BMP = jnp.where(index_BMP < 0, L, index_BMP)  # a negative index would wrap
        take = jax.vmap(lambda a_L, index: a_L.at[index].get(mode="fill", fill_value=0))

        @jax.checkpoint
        def pooled(h_BLD, kv_BLX):
            chunk_BMP, ids_BMP = take(chunk_BL, index_BMP), take(ids_BL, index_BMP)
            older_BMP = chunk_BMP[..., :1] - chunk_BMP  # the first position is the newest
            same_BMP = (ids_BMP == ids_BMP[..., :1]) & (ids_BMP != 0)
            own_BMP = same_BMP & (older_BMP == 0)
            h_BMPD = jnp.where(own_BMP[..., None], take(h_BLD, index_BMP), LOWEST)
            max_BMD = jnp.where(own_BMP[..., :1], jnp.max(h_BMPD, axis=2), 0.0)
            visible_BMP = same_BMP & (older_BMP < self.config.window)
            flat = lambda a: a.reshape(-1, *a.shape[2:])
            found = self.attend(flat(max_BMD), flat(take(kv_BLX, index_BMP)), flat(visible_BMP))
            return found.reshape(B, -1, found.shape[-1])

        return pooled(rows.h_BLD, self.keys(rows.h_BLD))

    def after(self, rows, boundaries):
        L, lengths_B1 = rows.h_BLD.shape[1], rows.lengths_B[:, None]
        mask_BL = boundaries.boundary_mask_BL
        ids_BL = rows.context.segment_ids_BL
        chunk_BL = jnp.where(ids_BL != 0, chunk_ids(mask_BL, ids_BL) - 1, -1)
        open_B = rows.at_end(chunk_BL + mask_BL.astype(jnp.int32))
        index_BP = lengths_B1 - self.room + jnp.arange(self.room, dtype=jnp.int32)[None]
        index_BP = jnp.where(index_BP < 0, L, index_BP)

        def take(a_BL, fill):
            one = lambda a_L, index_P: a_L.at[index_P].get(mode="fill", fill_value=fill)
            return jax.vmap(one)(a_BL, index_BP)

        is_open_BL1 = (chunk_BL == open_B[:, None])[..., None]
        max_BD = jnp.max(jnp.where(is_open_BL1, rows.h_BLD, LOWEST), axis=1)
        return self.keys(take(rows.h_BLD, 0.0)), take(chunk_BL, -1), open_B, max_BD
