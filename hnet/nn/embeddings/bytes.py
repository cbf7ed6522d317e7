"""The table of the official H-Net: one learned vector per byte value."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.embeddings.part import Embedding, EmbeddingConfig
from hnet.nn.parameters import parameter


class Bytes(Embedding):
    """One learned vector per byte value (goombalab/hnet)."""

    @dataclass(frozen=True)
    class Config(EmbeddingConfig):
        """One learned vector per byte value."""

    def __init__(self, config, vocab_size, d_model, *, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, d_model, rngs=rngs)
        table_VD = jax.random.normal(rngs.params(), (vocab_size, d_model), jnp.float32)
        self.embedding = parameter(table_VD, "vocab embed")

    def step(self, state, byte_R):
        return state, self.rows(byte_R)

    def __call__(self, input_ids_BL, context, *, key=None):
        return self.rows(input_ids_BL)

    @property
    def table_VD(self) -> jax.Array:
        return self.embedding[...].astype(jnp.float32)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of the table, (..., D)."""
        return jnp.take(self.table_VD, ids, axis=0)

    def attend(self, x_BLD, context=None, *, key=None):
        return jnp.dot(x_BLD, self.table_VD.T)
