"""A dechunk whose chunk vectors are positions of the decoder, where it begins again."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hnet.bounds import Count
from hnet.chunking.dechunks.cross_attention import CrossAttention
from hnet.chunking.dechunks.repeat import repeated
from hnet.chunking.part import DechunkConfig
from hnet.nn.cache import last_positions


class Prefix(CrossAttention):
    """Adds nothing to positions; `num_vectors` vectors of a chunk precede what is decoded from it.

    With alignment end they replace the chunk's last position, whose input the decoder
    does not get, and the last of them predicts the next position (HAT, arXiv 2501.10322; Learn Your
    Tokens, avi-jit/eTok). With alignment start they stand before the chunk's first position.
    """

    needs_memory = False
    stands_in_decoder = True

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """Vectors of a chunk as positions of a restarted decoder (HAT, Learn Your Tokens)."""

        num_vectors: Count = 1
        """k: number of positions for each chunk"""
        projection: bool = True
        """linear map of the main network's output to the vectors; False: its channels, split"""

        def problem_in(self, chunking):
            if chunking.decoder_scope != "chunk":
                return (
                    "decoder_scope='document' with dechunk='prefix', whose decoder begins again at "
                    "each chunk: use decoder_scope='chunk'"
                )
            if chunking.has_null_chunk:
                return (
                    "null='learned' with dechunk='prefix', whose first chunk is the first position "
                    "of a document: use null='first'"
                )
            return None

    def init(self, rows, d_in):
        return jnp.zeros((rows, self.config.num_vectors * self.d_model), jnp.float32)

    def write(self, state, y_RD, prob_R, config):
        return self.memory(y_RD[:, None].astype(jnp.float32))[:, 0]

    def after(self, y_BMD, boundaries, slots, config):
        lengths_B = jnp.sum(boundaries.segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        vectors_BMX = self.memory(y_BMD.astype(jnp.float32))
        return last_positions(repeated(vectors_BMX, boundaries, slots), lengths_B, 1)[:, 0]


def place_prefixes(boundary_mask_BL: jax.Array, more: int) -> jax.Array:
    """Place of each position in rows with `more` positions before each boundary, int32 (B, L)."""
    index_BL = jnp.arange(boundary_mask_BL.shape[1], dtype=jnp.int32)[None]
    return index_BL + more * jnp.cumsum(boundary_mask_BL, axis=1, dtype=jnp.int32)


def insert_prefixes(
    x_BLD: jax.Array,
    ids_BL: jax.Array,
    vectors_BLX: jax.Array,
    boundary_mask_BL: jax.Array,
    *,
    instead: bool,
    most: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of a decoder with prefixes: (inputs (B, X, D), segment ids, place of each position).

    vectors_BLX: the k vectors of each position's chunk, side by side. instead: the last vector
    takes the place of the boundary's own input. most: maximum number of boundaries of a row.
    """
    (B, L, D), k = x_BLD.shape, vectors_BLX.shape[-1] // x_BLD.shape[-1]
    more = k - instead
    length = L + more * min(most, L)
    row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    place_BL = place_prefixes(boundary_mask_BL, more)
    own_BL = jnp.where(boundary_mask_BL, length, place_BL) if instead else place_BL
    x_BXD = jnp.zeros((B, length, D), x_BLD.dtype).at[row_B1, own_BL].set(x_BLD, mode="drop")
    ids_BX = jnp.zeros((B, length), jnp.int32).at[row_B1, place_BL].set(ids_BL, mode="drop")
    for i, vector_BLD in enumerate(jnp.split(vectors_BLX, k, axis=-1)):
        at_BL = jnp.where(boundary_mask_BL, place_BL - more + i, length)
        x_BXD = x_BXD.at[row_B1, at_BL].set(vector_BLD, mode="drop")
        ids_BX = ids_BX.at[row_B1, at_BL].set(ids_BL, mode="drop")
    return x_BXD, ids_BX, place_BL


def read_places(y_BXD: jax.Array, place_BL: jax.Array) -> Any:
    """Outputs (B, L, D) of the positions at these places."""
    return jax.vmap(lambda y_XD, place_L: y_XD[place_L])(y_BXD, place_BL)
