"""What travels beside the states of a stack: where segments end, positions, key biases, memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """Vectors that cross-attention layers read, and which of them each position may see.

    Groups are chunks, numbered upwards along a row.
    """

    x_BKD: jax.Array
    group_BK: jax.Array
    """group of each vector, int32; a vector with a negative one is never seen"""
    query_group_BL: jax.Array
    """group of each position, int32; (R, 1) in a step"""
    segment_ids_BK: jax.Array | None = None
    """document of each vector, as `Context.segment_ids_BL`; None: one document per row"""


class Context(NamedTuple):
    """What positions know besides their states. Layers read the first three fields and `memory`."""

    segment_ids_BL: jax.Array
    """equal neighbours are a document (or chunk) and see nothing of others; 0 is padding"""
    positions_BL: jax.Array | None = None
    """positions for rotary, int32; default: the index within the segment"""
    key_bias_BL: jax.Array | None = None
    """float32 added to the attention score of each key"""
    route_ids_BL: jax.Array | None = None
    """route (script group) of each position, int32; None if routes are not told apart"""
    bytes_BL: jax.Array | None = None
    """byte values, int32"""
    levels_BL: jax.Array | None = None
    """boundary level of each position, for rules that cut several stages"""
    external_boundary_BL: jax.Array | None = None
    """boundaries that were handed in, bool"""
    memory: Memory | None = None
    """what cross-attention layers read"""


class StepContext(NamedTuple):
    """`Context` for the next position of R rows."""

    positions_R: jax.Array
    """number of positions that each row has had, which is the index of this one"""
    first_R: jax.Array | None = None
    """index of the first position in the scope of this one (a decoder whose scope is the chunk
    starts again at each); default: 0"""
    rotary_R: jax.Array | None = None
    """positions for rotary; default: the index within the scope"""
    key_bias_R: jax.Array | None = None
    """float32 added to the attention scores of this position's key, now and later"""
    memory: Memory | None = None
    """what cross-attention layers read at this position"""

    @property
    def rotary(self) -> jax.Array:
        """Position for rotary of each row."""
        if self.rotary_R is not None:
            return self.rotary_R
        return self.positions_R if self.first_R is None else self.positions_R - self.first_R

    def carried(self, state: jax.Array) -> jax.Array:
        """The state (R, ...) of a recurrence before this position: 0 where the scope begins."""
        if self.first_R is None:
            return state
        begins_R = self.first_R == self.positions_R
        return jnp.where(begins_R.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)
