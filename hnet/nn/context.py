"""Inputs of a stack in addition to its states: segments, positions, key biases, memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """Vectors of groups that cross-attention layers read; group numbers increase along a row.

    Groups are chunks. G: rows of memory, each shared by B / G neighbouring rows of states.
    """

    x_GMND: jax.Array
    """N vectors of each of M groups"""
    query_group_BL: jax.Array
    """group of each position, int32; (R, 1) in a step"""
    group_GM: jax.Array | None = None
    """numbers of the groups, int32; a negative one is invisible; None: 0, 1, ..., M - 1"""
    segment_ids_GM: jax.Array | None = None
    """document of each group, like `Context.segment_ids_BL`; None: one document per row"""
    query_segment_ids_BL: jax.Array | None = None
    """document of each position; None: `Context.segment_ids_BL`"""


class ChunkMemory(NamedTuple):
    """Chunk vectors that the decoder's cross-attention layers read in a stream: a ring buffer."""

    x_BCND: jax.Array
    """N vectors of the last C chunks; chunk m is at index m mod C"""
    count_B: jax.Array
    """number of chunks so far"""

    @property
    def now(self) -> Memory:
        """The memory of the next position, which reads the last chunk."""
        C, newest_B1 = self.x_BCND.shape[1], self.count_B[:, None] - 1
        age_BC = (newest_B1 - jnp.arange(C, dtype=jnp.int32)[None]) % C
        return Memory(self.x_BCND, newest_B1, newest_B1 - age_BC)

    def append(self, x_BND: jax.Array, on_B: jax.Array) -> "ChunkMemory":
        """The memory after one more chunk of the rows `on_B`."""
        B, C = self.x_BCND.shape[:2]
        row_B = jnp.where(on_B, jnp.arange(B, dtype=jnp.int32), B)
        x_BCND = self.x_BCND.at[row_B, self.count_B % C].set(x_BND, mode="drop")
        return ChunkMemory(x_BCND, self.count_B + on_B.astype(jnp.int32))

    @classmethod
    def after(cls, x_BMND: jax.Array, count_B: jax.Array, size: int) -> "ChunkMemory":
        """The memory after rows with these chunks, of which `count_B` are used."""
        index_C = jnp.arange(size, dtype=jnp.int32)[None]
        newest_B1 = count_B[:, None] - 1
        index_BC = newest_B1 - (newest_B1 - index_C) % size
        index_BC = jnp.where(index_BC < 0, x_BMND.shape[1], index_BC)
        take = jax.vmap(lambda x_MND, m_C: x_MND.at[m_C].get(mode="fill", fill_value=0))
        return cls(take(x_BMND, index_BC), count_B)


class Context(NamedTuple):
    """Inputs per position besides the states. Layers read the first three fields and `memory`."""

    segment_ids_BL: jax.Array
    """segments: equal neighbours are one document (or chunk), isolated from others; 0 = padding"""
    positions_BL: jax.Array | None = None
    """positions for rotary, int32; None: the index within the segment"""
    key_bias_BL: jax.Array | None = None
    """bias added to the attention score of each key, float32"""
    route_ids_BL: jax.Array | None = None
    """route (script group) of each position, int32; None if the model has one route"""
    bytes_BL: jax.Array | None = None
    """byte values, int32"""
    levels_BL: jax.Array | None = None
    """boundary level of each position, for rules that give the boundaries of several stages"""
    external_boundary_BL: jax.Array | None = None
    """boundaries given by the caller, bool"""
    memory: Memory | None = None
    """memory that cross-attention layers read"""


class StepContext(NamedTuple):
    """`Context` for the next position of R rows."""

    positions_R: jax.Array
    """index of this position in each row, which is the number of positions before it"""
    first_R: jax.Array | None = None
    """index of the first position in the scope of this one (a decoder with scope "chunk" restarts
    at each chunk); None: 0"""
    rotary_R: jax.Array | None = None
    """positions for rotary; None: the index within the scope"""
    key_bias_R: jax.Array | None = None
    """bias added to the attention scores of this position's key, now and later, float32"""
    memory: Memory | None = None
    """memory that cross-attention layers read at this position"""

    @property
    def rotary(self) -> jax.Array:
        """Rotary position of each row."""
        if self.rotary_R is not None:
            return self.rotary_R
        return self.positions_R if self.first_R is None else self.positions_R - self.first_R

    def carried(self, state: jax.Array) -> jax.Array:
        """State (R, ...) of a recurrence before this position; 0 where the scope begins."""
        if self.first_R is None:
            return state
        begins_R = self.first_R == self.positions_R
        return jnp.where(begins_R.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)


def apart(x_BME: jax.Array, context: Context, k: int) -> tuple[jax.Array, Context]:
    """Split positions of k vectors side by side into k positions each, (B, M k, E)."""
    if k == 1:
        return x_BME, context
    B, M, width = x_BME.shape
    repeated = {
        name: jnp.repeat(a, k, axis=1)
        for name, a in context._asdict().items()
        if name.endswith("_BL") and a is not None
    }
    return x_BME.reshape(B, M * k, width // k), context._replace(**repeated)


def together(y_BME: jax.Array, k: int) -> jax.Array:
    """The inverse of `apart` for states."""
    B, M, width = y_BME.shape
    return y_BME.reshape(B, M // k, k * width)
