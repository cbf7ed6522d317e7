"""From positions to chunk slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.router import RouterOutput
from hnet.nn.layers import segment_starts


class Chunks(NamedTuple):
    """M chunk slots a row, filled from the left; unused slots have segment 0."""

    x_BMD: jax.Array
    """pooled state of each chunk; the learned null in null slots, 0 in unused ones"""
    segment_ids_BM: jax.Array
    boundary_prob_BM: jax.Array
    """p at the boundary of each chunk; 1 in null slots, 0 in unused ones"""
    slot_BL: jax.Array
    """slot that each position reads; outside, or in another segment, where that was clipped"""
    route_ids_BM: jax.Array | None
    """route of the position that each chunk's slot was opened on: its first with alignment start,
    its last with alignment end (the segment's first for a null slot)"""


def position_of_slot(opens_BL: jax.Array, slot_BL: jax.Array, capacity: int) -> jax.Array:
    """Position that opens each slot, (B, M) int32; L where there is none.

    opens_BL: positions that open a slot; slot_BL: which one, dropped where it is no slot of M.
    """
    length = opens_BL.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)

    def one_row(opens_L, slot_L):
        slot_L = jnp.where(opens_L, slot_L, capacity)
        empty_M = jnp.full((capacity,), length, jnp.int32)
        return empty_M.at[slot_L].set(index_L, mode="drop")

    return jax.vmap(one_row)(opens_BL, slot_BL)


def chunk(
    pooled_BLD: jax.Array,
    route: RouterOutput,
    capacity: int,
    null_D: jax.Array | None = None,
) -> Chunks:
    """Gather the pooled state at the boundary of every chunk (arXiv 2507.07955, section 2.2.1).

    pooled_BLD: what a chunk would be if its boundary lay at each position (`hnet.chunking.pool`).
    null_D: state of the slot that each segment starts with, for alignment end (arXiv 2211.09761,
    section 2); with alignment start there is none.
    """
    mask_BL, segment_ids_BL = route.boundary_mask_BL, route.segment_ids_BL
    slot_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1
    if null_D is not None:
        opens_null_BL = segment_starts(segment_ids_BL) & (segment_ids_BL != 0)
        slot_BL = slot_BL + jnp.cumsum(opens_null_BL, axis=1, dtype=jnp.int32)
    opened_at_BM = position_of_slot(mask_BL, slot_BL, capacity)
    x_BMD = _select(pooled_BLD, opened_at_BM)
    p_BM = _select(route.boundary_prob_BL, opened_at_BM)
    if null_D is not None:
        null_slot_BL = slot_BL - mask_BL.astype(jnp.int32)
        null_at_BM = position_of_slot(opens_null_BL, null_slot_BL, capacity)
        is_null_BM = null_at_BM < mask_BL.shape[1]
        x_BMD = jnp.where(is_null_BM[..., None], null_D[None, None, :], x_BMD)
        p_BM = jnp.where(is_null_BM, 1.0, p_BM)
        opened_at_BM = jnp.minimum(opened_at_BM, null_at_BM)
    routes_BM = None if route.route_ids_BL is None else _select(route.route_ids_BL, opened_at_BM)
    return Chunks(x_BMD, _select(segment_ids_BL, opened_at_BM), p_BM, slot_BL, routes_BM)


def _select(values_BL: jax.Array, index_BM: jax.Array) -> jax.Array:
    """Values at positions, 0 for position L."""
    return jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=0))(values_BL, index_BM)
