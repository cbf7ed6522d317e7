"""What layers remember between positions of a stream, for rows that stand at different places.

Every array has a leading layer axis (a run of layers is stacked) and a row axis: (layers, B, ...).
A layer's `step` runs on R of the B rows and is told where its state lies by `at = (layer, rows_R)`.
Reads and writes cost O(R); a row number of B (padding of R) reads anything and writes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KV_BLOCK = 64  # slots that attention over a cache reads at a time


class KVCache(NamedTuple):
    """Rotated keys, and values, (layers, B, blocks, H, T, K), T slots a block.

    It is a ring: position t lies in slot t mod (blocks * T).
    """

    k: jax.Array
    v: jax.Array


class SSMCache(NamedTuple):
    """State of a Mamba-2 mixer."""

    conv: jax.Array
    """the last W - 1 inputs of the convolution, (layers, B, W - 1, C)"""
    state: jax.Array
    """h of the recurrence, float32 (layers, B, H, P, N)"""


def read(array: jax.Array, at: tuple) -> jax.Array:
    """The rows `at` of a cache array, (R, ...)."""
    return array.at[at].get(mode="clip")


def write(array: jax.Array, at: tuple, new: jax.Array) -> jax.Array:
    return array.at[at].set(new.astype(array.dtype), mode="drop")


def last_positions(x_BLD: jax.Array, lengths_B: jax.Array, count: int) -> jax.Array:
    """The `count` positions before each row's length, (B, count, ...); 0 before its start."""
    index_BW = lengths_B[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None, :]
    return jax.vmap(_take)(x_BLD, index_BW)


def ring(x_BLHK: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """The newest positions of each row in their slots, (B, blocks, H, T, K); room for `size`."""
    T = min(KV_BLOCK, size)
    blocks = -(-size // T)
    slot_M = jnp.arange(blocks * T, dtype=jnp.int32)[None, :]
    newest_B1 = lengths_B[:, None] - 1
    index_BM = newest_B1 - (newest_B1 - slot_M) % (blocks * T)
    x_BMHK = jax.vmap(_take)(x_BLHK, index_BM)
    return x_BMHK.reshape(len(x_BLHK), blocks, T, *x_BLHK.shape[2:]).swapaxes(2, 3)


def _take(x_LD, index_W):
    index_W = jnp.where(index_W < 0, x_LD.shape[0], index_W)  # a negative index would wrap
    return x_LD.at[index_W].get(mode="fill", fill_value=0)
