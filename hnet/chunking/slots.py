"""Chunk slots: which position opens each slot, and which slot each position reads."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Boundaries
from hnet.nn.context import Context
from hnet.nn.layers import segment_starts


class Slots(NamedTuple):
    """M chunk slots per row, filled from the left; unused slots have segment 0."""

    opened_at_BM: jax.Array
    """position that opens each slot, where the main network runs, int32; L in unused slots"""
    is_null_BM: jax.Array | None
    """mask of null chunks, which have no positions of their own; None if there are none"""
    slot_BL: jax.Array
    """slot that each position reads; if it was clipped, an index out of range or a slot of another
    segment (see `is_read_BL`)"""
    boundary_prob_BM: jax.Array
    """p at the boundary of each chunk; 1 in null chunks, 0 in unused slots"""
    context: Context
    """context of the positions that open the slots"""

    def gather(self, values_BL: jax.Array) -> jax.Array:
        """Values (B, L, ...) at the positions that open slots; 0 in unused slots."""
        return _select(values_BL, self.opened_at_BM)

    def scatter(self, values_BM: jax.Array) -> jax.Array:
        """Values (B, L, ...) of the slot that each position reads, from (B, M, ...)."""
        take = jax.vmap(lambda values_M, slot_L: values_M.at[slot_L].get(mode="clip"))
        return take(values_BM, self.slot_BL)

    def is_read_BL(self, segment_ids_BL: jax.Array) -> jax.Array:
        """Whether a position has a slot to read; False if all slots of its segment were clipped."""
        return (self.slot_BL >= 0) & (self.scatter(self.context.segment_ids_BL) == segment_ids_BL)


def open_slots(
    boundaries: Boundaries, context: Context, capacity: int, *, has_null_chunk: bool = False
) -> Slots:
    """One slot per boundary in use; `has_null_chunk`: also one at the start of each segment.

    Position t reads slot cumsum(b)_t - 1, plus the number of null chunks up to t (arXiv 2507.07955,
    section 2.2.1; arXiv 2211.09761, section 2).
    """
    mask_BL, segment_ids_BL = boundaries.boundary_mask_BL, context.segment_ids_BL
    opened_BL = mask_BL if boundaries.opened_BL is None else boundaries.opened_BL
    slot_BL = jnp.cumsum(opened_BL, axis=1, dtype=jnp.int32) - 1
    is_null_BM = None
    if has_null_chunk:
        opens_null_BL = segment_starts(segment_ids_BL) & (segment_ids_BL != 0)
        slot_BL = slot_BL + jnp.cumsum(opens_null_BL, axis=1, dtype=jnp.int32)
    opened_at_BM = position_of_slot(opened_BL, slot_BL, capacity)
    p_BM = _select(boundaries.boundary_prob_BL, opened_at_BM)
    if has_null_chunk:
        null_slot_BL = slot_BL - mask_BL.astype(jnp.int32)
        null_at_BM = position_of_slot(opens_null_BL, null_slot_BL, capacity)
        is_null_BM = null_at_BM < mask_BL.shape[1]
        p_BM = jnp.where(is_null_BM, 1.0, p_BM)
        opened_at_BM = jnp.minimum(opened_at_BM, null_at_BM)
    if boundaries.opened_BL is not None:  # positions read the slot of the last boundary
        slot_BL = jax.lax.cummax(jnp.where(mask_BL, slot_BL, -1), axis=1)
        context = context._replace(key_bias_BL=boundaries.key_bias_BL)
    inner = context._replace(
        **{
            name: _select(values, opened_at_BM)
            for name, values in context._asdict().items()
            if name.endswith("_BL") and values is not None
        }
    )
    return Slots(opened_at_BM, is_null_BM, slot_BL, p_BM, inner)


def position_of_slot(opens_BL: jax.Array, slot_BL: jax.Array, capacity: int) -> jax.Array:
    """Position that opens each slot, (B, M) int32; L for unused slots.

    opens_BL: positions that open a slot. slot_BL: the slot; indices outside [0, M) are dropped.
    """
    length = opens_BL.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)

    def one_row(opens_L, slot_L):
        slot_L = jnp.where(opens_L, slot_L, capacity)
        empty_M = jnp.full((capacity,), length, jnp.int32)
        return empty_M.at[slot_L].set(index_L, mode="drop")

    return jax.vmap(one_row)(opens_BL, slot_BL)


def _select(values_BL: jax.Array, index_BM: jax.Array) -> jax.Array:
    """Values at positions, 0 for position L."""
    return jax.vmap(lambda v, i: v.at[i].get(mode="fill", fill_value=0))(values_BL, index_BM)


def bucket(full: int, slots: float, per_octave: int = 32, least: int = 8) -> int:
    """Smallest capacity >= `slots`: `per_octave` (a power of two) values from one power of two to
    the next, multiples of `least`, at most `full`."""
    step = max(least, (1 << math.ceil(slots).bit_length() >> 1) // per_octave)
    return min(full, -(-math.ceil(slots) // step) * step)
