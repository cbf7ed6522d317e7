"""Routers that are rules: of the bytes, or of a position's index."""

import jax
import jax.numpy as jnp

from hnet.chunking.config import ChunkingConfig
from hnet.nn.layers import segment_positions, segment_starts


def is_spacelike(byte: jax.Array) -> jax.Array:
    """Neither an ASCII letter or digit nor a UTF-8 continuation byte (kjslag/spacebyte)."""
    folded = byte | 0x20  # upper case onto lower
    alphanumeric = ((folded >= ord("a")) & (folded <= ord("z"))) | (
        (byte >= ord("0")) & (byte <= ord("9"))
    )
    return ~(alphanumeric | ((byte >= 0x80) & (byte <= 0xBF)))


def spacelike(input_ids_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """The first spacelike byte of each run of them (SpaceByte, arXiv 2404.14408).

    The byte before a segment counts as none, so a segment that begins spacelike has a boundary.
    """
    now_BL = is_spacelike(input_ids_BL)
    before_BL = jnp.pad(now_BL[:, :-1], ((0, 0), (1, 0)))
    return now_BL & (~before_BL | segment_starts(segment_ids_BL))


def whitespace(input_ids_BL: jax.Array) -> jax.Array:
    """Every space (0x20), the only white space in dynamic-pooling's text (arXiv 2211.09761)."""
    return input_ids_BL == ord(" ")


def fixed(segment_ids_BL: jax.Array, stride: int) -> jax.Array:
    """Positions 0, stride, 2 stride, ... of each segment, whatever a boundary means there.

    With alignment end the first chunk therefore holds one position, as in dynamic-pooling.
    """
    return segment_positions(segment_ids_BL) % stride == 0


def byte_boundaries(
    chunking: ChunkingConfig,
    input_ids_BL: jax.Array,
    segment_ids_BL: jax.Array,
    given_BL: jax.Array | None = None,
) -> jax.Array:
    """Boundaries of a stage whose router is a rule of bytes or is told them, bool (B, L)."""
    match chunking.router:
        case "spacelike":
            return spacelike(input_ids_BL, segment_ids_BL)
        case "whitespace":
            return whitespace(input_ids_BL)
        case _:
            return given_BL
