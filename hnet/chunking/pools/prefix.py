"""The pool of word encoders: tokens in front of each chunk, in a bidirectional Transformer."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hnet.bounds import Count, Natural
from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids
from hnet.nn.cache import last_positions
from hnet.nn.context import Context
from hnet.nn.isotropic import Isotropic
from hnet.nn.layers import linear, segment_starts
from hnet.nn.parameters import parameter
from hnet.nn.settings import ComputeConfig, SharedConfig, StackConfig


class Prefix(Pool):
    """Outputs of k learned tokens that stand before the positions of a chunk (HAT, Learn Your
    Tokens): with alignment end of the chunk that ends, with start of the chunk before.

    The encoder sees [tokens, positions of the chunk] and nothing else, in both directions. Whole
    rows insert the tokens into the row, so that one attention with one segment per chunk does all
    chunks: L + k M positions. A stream keeps the positions of the open chunk and encodes them at
    every step.
    """

    alignments = ("start", "end")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Tokens before each chunk in a bidirectional Transformer (HAT, Learn Your Tokens)."""

        tokens: Count = 1
        """k: number of tokens, which is the number of positions of the main network per chunk"""
        length: Count = 16
        """number of positions that the encoder sees, the last ones of a longer chunk"""
        layers: Count = 1
        """number of layers of attention"""
        num_heads: Count = 1
        """number of attention heads"""
        d_intermediate: Natural = 0
        """inner width of the layers' SwiGLU MLPs; 0 = no MLPs"""

        def problem_at_width(self, d_model):
            if d_model % self.num_heads:
                return f"num_heads={self.num_heads}: use a divisor of d_model={d_model}"
            return None

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.encoder = _encoder(config, place, rngs=rngs)
        self.is_before = place.chunking.alignment == "start"
        D, k = place.d_model, config.tokens
        tokens_KD = jax.random.normal(rngs.params(), (k, D), jnp.float32)
        self.tokens = parameter(tokens_KD, "taps channels")
        self.proj = linear(D, place.d_inner, "embed out", dtype=place.dtype, rngs=rngs)

    @classmethod
    def d_out(cls, config, place):
        return place.d_inner

    @classmethod
    def num_slots(cls, config):
        return config.tokens

    def project(self, y_BMKD: jax.Array) -> jax.Array:
        """Vectors of a chunk side by side, (B, M, k E)."""
        return self.proj(y_BMKD).astype(jnp.float32).reshape(*y_BMKD.shape[:2], -1)

    def init(self, rows, d_model):
        open_RCD = jnp.zeros((rows, self.config.length, d_model), jnp.float32)
        return open_RCD, jnp.zeros((rows,), jnp.int32)

    def step(self, state, x):
        before, state = state, self.append(state, x.h_RD)
        return state, self.encode(*(before if self.is_before else state))

    def restart(self, state, rows, d_model):
        if not self.is_before:
            return self.init(rows, d_model)
        open_RCD, count_R = state  # the position of the boundary is the first of the open chunk
        take = jax.vmap(lambda open_CD, count: open_CD.at[count - 1].get(mode="clip"))
        return self.append(self.init(rows, d_model), take(open_RCD, count_R))

    def append(self, state, h_RD):
        (open_RCD, count_R), C = state, self.config.length
        is_full_R = (count_R == C)[:, None, None]
        open_RCD = jnp.where(is_full_R, jnp.roll(open_RCD, -1, axis=1), open_RCD)
        at_RC = jnp.arange(C, dtype=jnp.int32)[None] == jnp.minimum(count_R, C - 1)[:, None]
        return jnp.where(at_RC[..., None], h_RD[:, None], open_RCD), jnp.minimum(count_R + 1, C)

    def encode(self, open_RCD: jax.Array, count_R: jax.Array) -> jax.Array:
        """Vectors of chunks of `count` positions, (R, k E)."""
        (R, C, D), k = open_RCD.shape, self.config.tokens
        tokens_RKD = jnp.broadcast_to(self.tokens[...][None], (R, k, D))
        is_used = jnp.arange(k + C, dtype=jnp.int32)[None] < k + count_R[:, None]
        x_RTD = jnp.concatenate([tokens_RKD, open_RCD], axis=1)
        y_RTD = self.encoder(x_RTD, Context(is_used.astype(jnp.int32)))
        return self.project(y_RTD[:, None, :k])[:, 0]

    def chunk_ids(self, boundaries, segment_ids_BL: jax.Array) -> jax.Array:
        """Number of each position's chunk, from 1; a document begins another."""
        mask_BL = boundaries.boundary_mask_BL
        if not self.is_before:
            return chunk_ids(mask_BL, segment_ids_BL)
        return jnp.cumsum(mask_BL | segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)

    def __call__(self, rows, boundaries, slots):
        h_BLD, k, C = rows.h_BLD, self.config.tokens, self.config.length
        (B, L, D), ends_BM = h_BLD.shape, slots.opened_at_BM
        M, T = ends_BM.shape[1], L + k * ends_BM.shape[1]
        index_L = jnp.arange(L, dtype=jnp.int32)[None]
        ids_BL = self.chunk_ids(boundaries, rows.context.segment_ids_BL)
        take = jax.vmap(lambda values, index: values.at[index].get(mode="fill", fill_value=0))
        is_slot_BM = ends_BM < L
        if slots.is_null_BM is not None:
            is_slot_BM &= ~slots.is_null_BM
        at_BM = jnp.where(is_slot_BM, ends_BM, L)
        if self.is_before:  # the first chunk of a document has none before it
            starts_BL = segment_starts(rows.context.segment_ids_BL).astype(jnp.int32)
            ends_BM = ends_BM - 1
            at_BM = jnp.where(is_slot_BM & (take(starts_BL, at_BM) == 0), ends_BM, L)

        def next_chunk(values_BM, none):
            """Value of the next slot whose chunk ends at or after each position, (B, L)."""
            put = jax.vmap(lambda at_M, values_M: jnp.full((L,), none, jnp.int32).at[at_M].set(
                values_M, mode="drop"))  # fmt: skip
            return jax.lax.cummin(put(at_BM, values_BM), axis=1, reverse=True)

        index_M = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (B, M))
        end_BL, slot_BL = next_chunk(ends_BM, L), next_chunk(index_M, M)
        is_seen_BL = (end_BL - index_L < C) & (take(ids_BL, end_BL) == ids_BL)
        place_BL = jnp.where(is_seen_BL, index_L + k * (slot_BL + 1), T)
        add = jax.vmap(lambda slot_L, seen_L: jnp.zeros((M,), jnp.int32).at[slot_L].add(
            seen_L, mode="drop"))  # fmt: skip
        first_BM = ends_BM - add(slot_BL, is_seen_BL.astype(jnp.int32)) + 1 + k * index_M
        token_BMK = first_BM[..., None] + jnp.arange(k, dtype=jnp.int32)[None, None]
        token_BMK = jnp.where(is_slot_BM[..., None], token_BMK, T)

        def lay_out(h_LD, slot_L, place_L, token_MK):
            """The tokens of each chunk, then its positions; its segment is its slot plus 1."""
            token_N = token_MK.reshape(-1)
            x_TD = jnp.zeros((T, D), jnp.float32).at[place_L].set(h_LD, mode="drop")
            x_TD = x_TD.at[token_N].set(jnp.tile(self.tokens[...], (M, 1)), mode="drop")
            ids_T = jnp.zeros((T,), jnp.int32).at[place_L].set(slot_L + 1, mode="drop")
            own_N = jnp.repeat(jnp.arange(1, M + 1, dtype=jnp.int32), k)
            return x_TD, ids_T.at[token_N].set(own_N, mode="drop")

        x_BTD, ids_BT = jax.vmap(lay_out)(h_BLD, slot_BL, place_BL, token_BMK)
        return self.project(take(self.encoder(x_BTD, Context(ids_BT)), token_BMK))

    def after(self, rows, boundaries):
        C, mask_BL = self.config.length, boundaries.boundary_mask_BL
        ids_BL = self.chunk_ids(boundaries, rows.context.segment_ids_BL)
        next_BL = ids_BL if self.is_before else ids_BL + mask_BL.astype(jnp.int32)
        ids_BC = last_positions(ids_BL, rows.lengths_B, C)
        is_open_BC = (ids_BC == rows.at_end(next_BL)[:, None]) & (ids_BC != 0)
        last_BCD = last_positions(rows.h_BLD, rows.lengths_B, C)
        count_B = jnp.sum(is_open_BC, axis=1, dtype=jnp.int32)
        to_left = jax.vmap(lambda last_CD, count: jnp.roll(last_CD, count, axis=0))
        return to_left(jnp.where(is_open_BC[..., None], last_BCD, 0.0), count_B), count_B


def _encoder(config: Any, place: Any, *, rngs) -> Isotropic:
    """A stack of layers that look in both directions."""
    D, heads, width = place.d_model, config.num_heads, config.d_intermediate
    layout = f"{'T' if width else 't'}{config.layers}"
    stack = StackConfig(
        (layout,), D, width, heads, D // heads // 2 * 2, config.tokens + config.length - 1
    )
    shared = SharedConfig(compute=ComputeConfig(dtype=place.dtype))
    residuals = config.layers * (2 if width else 1)
    return Isotropic(shared, stack, layout, num_residuals=residuals, causal=False, rngs=rngs)
