"""UTF-8 characters of a byte stream: where they begin and where they are complete.

Both functions are causal and read no more than the bytes of the segment up to each position.
"""

import jax
import jax.numpy as jnp

from hnet.nn.layers import segment_starts


def is_continuation(byte: jax.Array) -> jax.Array:
    """Whether a byte continues a character (0x80 to 0xBF)."""
    return (byte & 0xC0) == 0x80


def continuations(byte: jax.Array) -> jax.Array:
    """Number of continuation bytes that the first byte of a character announces; 0 for a byte that
    begins none (RFC 3629)."""
    two, three, four = ((byte >= low) & (byte <= 0xF4) for low in (0xC2, 0xE0, 0xF0))
    return sum(each.astype(jnp.int32) for each in (two, three, four))


def missing_after(missing: jax.Array, byte: jax.Array) -> jax.Array:
    """Continuation bytes that the last character still lacks after `byte`, from those before it."""
    return jnp.where(is_continuation(byte), jnp.maximum(missing - 1, 0), continuations(byte))


def missing(bytes_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Continuation bytes that the last character lacks after each position, int32 (B, L).

    0 after the last byte of a character, and after bytes that are not UTF-8.
    """
    index_BL = jnp.broadcast_to(
        jnp.arange(bytes_BL.shape[1], dtype=jnp.int32)[None], bytes_BL.shape
    )
    anew_BL = ~is_continuation(bytes_BL) | segment_starts(segment_ids_BL)
    first_BL = jax.lax.cummax(jnp.where(anew_BL, index_BL, 0), axis=1)
    announced_BL = jnp.take_along_axis(continuations(bytes_BL), first_BL, axis=1)
    return jnp.maximum(announced_BL - (index_BL - first_BL), 0)
