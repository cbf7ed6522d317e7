"""A dechunk whose chunk vectors are read only by cross-attention layers of the decoder."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.bounds import Count, Natural
from hnet.chunking.part import Dechunk, DechunkConfig
from hnet.nn.layers import linear


class CrossAttention(Dechunk):
    """Adds nothing to positions; layers x of the decoder read `num_vectors` vectors per chunk.

    The vectors are a projection of the main network's output for the chunk, as in BLT's decoder
    (arXiv 2412.09871, section 3.3; facebookresearch/blt). `Dechunk.memory` has them.
    """

    needs_memory = True
    reads_all_vectors = True

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """Cross-attention of the decoder's layers x to vectors of chunks (BLT, TFree-HAT)."""

        num_vectors: Count = 1
        """number of vectors per chunk"""
        projection: bool = True
        """linear map of the main network's output to the vectors; False: its channels, split"""
        width: Natural = 0
        """width of a vector; 0 = d_model"""

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.d_model = place.d_model
        d_in = place.chunking.slots_per_chunk * place.d_inner
        d_out = self.memory_width(config, place)
        self.projection = (
            linear(d_in, d_out, "embed out", std=d_in**-0.5, dtype=jnp.float32, rngs=rngs)
            if config.projection
            else None
        )

    @classmethod
    def d_in(cls, config, place):
        if config.projection:
            return place.d_inner
        return cls.memory_width(config, place) // place.chunking.slots_per_chunk

    @classmethod
    def memory_width(cls, config, place):
        return config.num_vectors * (getattr(config, "width", 0) or place.d_model)

    def memory(self, y_BMD: jax.Array) -> jax.Array:
        return y_BMD if self.projection is None else self.projection(y_BMD)

    def init(self, rows, d_in):
        return jnp.zeros((rows, 0), jnp.float32)

    def write(self, state, y_RD, prob_R, config):
        return state

    def read(self, state, is_boundary_R, config):
        return state, jnp.zeros((state.shape[0], self.d_model), jnp.float32)

    def __call__(self, y_BMD, boundaries, slots, config):
        return jnp.zeros((*boundaries.segment_ids_BL.shape, self.d_model), jnp.float32)

    def after(self, y_BMD, boundaries, slots, config):
        return self.init(y_BMD.shape[0], y_BMD.shape[-1])
