"""Pools of the largest or smallest value of each channel over a chunk."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids

LOWEST = jnp.finfo(jnp.float32).min


class Max(Pool):
    """max_t h_t of each channel over the chunk that ends at the boundary (facebookresearch/blt).

    Positions that share the largest value share its gradient equally, as in torch.
    """

    sign: ClassVar[int] = 1

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Largest value of each channel over the chunk (BLT)."""

    def init(self, rows, d_model):
        return jnp.full((rows, d_model), LOWEST)

    def step(self, state, x):
        state = jnp.maximum(state, self.sign * x.h_RD)
        return state, self.sign * state

    def __call__(self, rows, boundaries, slots):
        mask_BL, ids_BL = boundaries.boundary_mask_BL, rows.context.segment_ids_BL
        M = slots.opened_at_BM.shape[1]
        ends_BM = jnp.where(slots.context.segment_ids_BL != 0, slots.context.segment_ids_BL, -1)
        if slots.is_null_BM is not None:
            ends_BM = jnp.where(slots.is_null_BM, -1, ends_BM)
        slot_BL = jnp.where(mask_BL, slots.slot_BL, slots.slot_BL + 1)  # the next boundary's
        inside_BL = (slot_BL >= 0) & (slot_BL < M)
        take = jax.vmap(lambda a_M, slot_L: a_M.at[slot_L].get(mode="fill", fill_value=-1))
        inside_BL &= take(ends_BM, jnp.where(inside_BL, slot_BL, M)) == ids_BL
        slot_BL = jnp.where(inside_BL, slot_BL, M)

        def pooled(h_LD, slot_L):
            fixed_LD = self.sign * jax.lax.stop_gradient(h_LD)
            top_MD = jnp.full((M, h_LD.shape[1]), LOWEST).at[slot_L].max(fixed_LD, mode="drop")
            top_LD = top_MD.at[slot_L].get(mode="fill", fill_value=0)
            is_top_LD = (fixed_LD == top_LD) & (slot_L < M)[:, None]
            zeros_MD = jnp.zeros_like(top_MD)
            add = lambda a_LD: zeros_MD.at[slot_L].add(jnp.where(is_top_LD, a_LD, 0), mode="drop")
            return add(h_LD) / jnp.maximum(add(jnp.ones_like(h_LD)), 1)

        return jax.vmap(pooled)(rows.h_BLD, slot_BL)

    def after(self, rows, boundaries):
        mask_BL, ids_BL = boundaries.boundary_mask_BL, rows.context.segment_ids_BL
        chunk_BL = jnp.where(ids_BL != 0, chunk_ids(mask_BL, ids_BL), 0)
        open_B = rows.at_end(chunk_BL + mask_BL.astype(jnp.int32))
        is_open_BL1 = ((chunk_BL == open_B[:, None]) & (chunk_BL > 0))[..., None]
        return jnp.max(jnp.where(is_open_BL1, self.sign * rows.h_BLD, LOWEST), axis=1)


class Min(Max):
    """min_t h_t of each channel over the chunk that ends at the boundary (facebookresearch/blt)."""

    sign = -1

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Smallest value of each channel over the chunk (BLT)."""
