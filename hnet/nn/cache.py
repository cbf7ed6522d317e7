"""Layer caches for streaming; rows may be at different positions.

Every array has a leading layer axis (a run of layers is stacked) and a row axis: (layers, B, ...).
A layer's `step` runs on R of the B rows and finds its state at `at = (layer, rows)`. Reads and
writes cost O(R). With layer None the arrays have no layer axis (`hnet.decode.apart`).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

KV_BLOCK = 64  # slots per block of a key-value cache; attention reads one block at a time


@partial(jax.tree_util.register_dataclass, data_fields=["index_R"], meta_fields=["are_all"])
@dataclass(frozen=True)
class Rows:
    """R rows of a batch of B."""

    index_R: jax.Array
    """indices of the rows; index B reads an arbitrary row and writes nothing"""
    are_all: bool = False
    """whether R = B and index r is r or B: no gather or scatter is needed"""


class KVCache(NamedTuple):
    """Rotated keys, and values, (layers, B, blocks, H, T, K), T slots per block.

    A ring buffer: position t is in slot t mod (blocks * T).
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None
    """bias added to the scores of each key, float32 (layers, B, blocks, T)"""


class RecurrentCache(NamedTuple):
    """State of a mixer with a short convolution and a recurrence."""

    conv: jax.Array
    """last W - 1 inputs of the convolution, (layers, B, W - 1, C)"""
    state: jax.Array
    """state h of the recurrence, float32, e.g. (layers, B, H, P, N)"""


def read(array: jax.Array, at: tuple) -> jax.Array:
    """Entries (R, ...) at `(layer, rows)`, or at `(layer, rows, index of the third axis)`."""
    layer, rows, *inner = at
    outer = () if layer is None else (layer,)
    if not rows.are_all:
        return array.at[(*outer, rows.index_R, *inner)].get(mode="clip")
    if not (outer or inner):
        return array
    B, *rest = array.shape[len(outer) :]
    rest = rest[len(inner) :]
    start = (*outer, 0, *inner, *(0 for _ in rest))
    size = (*(1 for _ in outer), B, *(1 for _ in inner), *rest)
    return jax.lax.dynamic_slice(array, start, size).reshape(B, *rest)


def write(array: jax.Array, at: tuple, new: jax.Array) -> jax.Array:
    """`array` with `new` (R, ...) at `(layer, rows)`, or at `(layer, rows, *further indices)`."""
    layer, rows, *inner = at
    outer = () if layer is None else (layer,)
    new = new.astype(array.dtype)
    if inner or not rows.are_all:
        return array.at[(*outer, rows.index_R, *inner)].set(new, mode="drop")
    is_row = (rows.index_R < len(rows.index_R)).reshape(-1, *(1,) * (new.ndim - 1))
    new = jnp.where(is_row, new, read(array, at))
    return jax.lax.dynamic_update_index_in_dim(array, new, layer, 0) if outer else new


def last_positions(x_BLD: jax.Array, lengths_B: jax.Array, count: int) -> jax.Array:
    """Last `count` positions before each row's length, (B, count, ...); 0 before the row starts."""
    index_BW = lengths_B[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None, :]
    return jax.vmap(_take)(x_BLD, index_BW)


def in_last_segment(segment_ids_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Mask of the positions in each row's last segment, bool (B, L)."""
    last_B1 = last_positions(segment_ids_BL, lengths_B, 1)
    return (segment_ids_BL == last_B1) & (segment_ids_BL != 0)


def ring(x_BLHK: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """Ring buffer with each row's newest positions, (B, blocks, H, T, K); at least `size` slots."""
    T = min(KV_BLOCK, size)
    blocks = -(-size // T)
    L, slot_M = x_BLHK.shape[1], jnp.arange(blocks * T, dtype=jnp.int32)[None, :]
    if L <= blocks * T:  # slot t is position t: no gather, which is slow for a long buffer
        is_used_BL = slot_M[:, :L] < lengths_B[:, None]
        x_BLHK = jnp.where(is_used_BL[..., None, None], x_BLHK, 0)
        x_BMHK = jnp.pad(x_BLHK, ((0, 0), (0, blocks * T - L), (0, 0), (0, 0)))
    else:
        newest_B1 = lengths_B[:, None] - 1
        index_BM = newest_B1 - (newest_B1 - slot_M) % (blocks * T)
        x_BMHK = jax.vmap(_take)(x_BLHK, index_BM)
    return x_BMHK.reshape(len(x_BLHK), blocks, T, *x_BLHK.shape[2:]).swapaxes(2, 3)


def _take(x_LD, index_W):
    index_W = jnp.where(index_W < 0, x_LD.shape[0], index_W)  # negative indices would wrap
    return x_LD.at[index_W].get(mode="fill", fill_value=0)
