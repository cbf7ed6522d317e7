"""Dechunks that copy a chunk's vector to positions unchanged."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.part import Dechunk, DechunkConfig
from hnet.chunking.slots import Slots
from hnet.nn.cache import last_positions


def repeated(y_BMD: jax.Array, boundaries: Boundaries, slots: Slots) -> jax.Array:
    """y_{slot(t)} at every position t, float32.

    If all slots of a segment were clipped, its positions read 0, never another document's chunk.
    """
    reads_BL = slots.is_read_BL(boundaries.segment_ids_BL)
    return jnp.where(reads_BL[..., None], slots.scatter(y_BMD.astype(jnp.float32)), 0.0)


class Repeat(Dechunk):
    """Position t reads y_{slot(t)} (arXiv 2211.09761, section 2)."""

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """The last chunk's vector, repeated (DTP, BLT)."""

    def write(self, state, y_RD, prob_R, config):
        return y_RD.astype(jnp.float32)

    def __call__(self, y_BMD, boundaries, slots, config):
        return repeated(y_BMD, boundaries, slots)

    def after(self, y_BMD, boundaries, slots, config):
        lengths_B = jnp.sum(boundaries.segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        return last_positions(repeated(y_BMD, boundaries, slots), lengths_B, 1)[:, 0]


class AtBoundaries(Repeat):
    """y_{slot(t)} at boundaries, 0 elsewhere (SpaceByte, arXiv 2404.14408)."""

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """The chunk's vector at its boundary only (SpaceByte)."""

    def read(self, state, is_boundary_R, config):
        return state, jnp.where(is_boundary_R[:, None], state, 0.0)

    def __call__(self, y_BMD, boundaries, slots, config):
        out_BLD = repeated(y_BMD, boundaries, slots)
        return jnp.where(boundaries.boundary_mask_BL[..., None], out_BLD, 0.0)
