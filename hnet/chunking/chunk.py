"""From positions to chunk slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chunks(NamedTuple):
    """M chunk slots a row, filled from the left; unused slots have segment 0."""

    x_BMD: jax.Array
    """state of the position where each chunk starts; 0 in unused slots"""
    segment_ids_BM: jax.Array
    boundary_prob_BM: jax.Array
    """p at the position where each chunk starts; 0 in unused slots"""


def boundary_index(boundary_mask_BL: jax.Array, capacity: int) -> jax.Array:
    """Position of the m-th boundary of each row, (B, M) int32; L where there is none.

    The mask has at most `capacity` boundaries a row (`router.decide` sees to that).
    """
    length = boundary_mask_BL.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)

    def one_row(mask_L):
        slot_L = jnp.where(mask_L, jnp.cumsum(mask_L, dtype=jnp.int32) - 1, capacity)
        empty_M = jnp.full((capacity,), length, jnp.int32)
        return empty_M.at[slot_L].set(index_L, mode="drop")

    return jax.vmap(one_row)(boundary_mask_BL)


def chunk(
    x_BLD: jax.Array,
    boundary_mask_BL: jax.Array,
    boundary_prob_BL: jax.Array,
    segment_ids_BL: jax.Array,
    capacity: int,
) -> Chunks:
    """Select the first position of every chunk (arXiv 2507.07955, section 2.2.1).

    The encoder is causal, so the state where a chunk starts carries what came before it; a mean
    over the chunk would carry its future (`spec` of the START alignment).
    """
    index_BM = boundary_index(boundary_mask_BL, capacity)

    def select(values_L, index_M):
        return values_L.at[index_M].get(mode="fill", fill_value=0)

    return Chunks(
        jax.vmap(select)(x_BLD, index_BM),
        jax.vmap(select)(segment_ids_BL, index_BM),
        jax.vmap(select)(boundary_prob_BL, index_BM),
    )
