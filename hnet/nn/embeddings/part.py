"""Interface of embeddings: bytes -> vectors, for whole rows or one byte at a time.

Only the streaming form is required: the default `__call__` scans over `step`, which is correct but
slow. Each document starts with the state that `init` returns, so documents are independent.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.context import Context
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.layers import segment_starts
from hnet.parts import Part, Settings


class EmbeddingConfig(Settings):
    """Settings of an embedding."""

    table = EMBEDDINGS

    def num_parameters(self, vocab_size: int, d_model: int) -> int:
        """Number of its parameters."""
        return vocab_size * d_model


class Embedding(Part, nnx.Module):
    """Computes the vector of each byte from the bytes of its document up to it."""

    Config = EmbeddingConfig

    def __init__(self, config: Any, vocab_size: int, d_model: int, *, rngs: nnx.Rngs):
        self.config = config

    def init(self, rows: int) -> Any:
        """State of a stream of `rows` rows before the first byte: arrays (R, ...)."""
        return ()

    def step(self, state: Any, byte_R: jax.Array) -> tuple[Any, jax.Array]:
        """(state, vectors (R, D)) of the next byte of R rows."""
        raise TypeError(f"{type(self).__name__} needs step(state, byte)")

    def __call__(
        self, input_ids_BL: jax.Array, context: Context, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Vectors (B, L, D) of whole rows. key: PRNG key in training, for an embedding that draws
        random numbers."""
        return self._step_through(input_ids_BL, context)[0]

    def after(self, input_ids_BL: jax.Array, context: Context) -> Any:
        """State of a stream after these rows: one document per row, padded on the right."""
        state = self.init(input_ids_BL.shape[0])
        if not jax.tree.leaves(state):
            return state
        return self._step_through(input_ids_BL, context)[1]

    def attend(
        self, x_BLD: jax.Array, context: Context | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits (B, L, V) of a head that is tied to the embedding."""
        raise TypeError(f"{type(self).__name__} has no table to tie the head to")

    def _step_through(self, input_ids_BL: jax.Array, context: Context) -> tuple[jax.Array, Any]:
        ids_BL = context.segment_ids_BL
        first = self.init(input_ids_BL.shape[0])

        def one(state, x):
            byte_R, starts_R, valid_R = x
            new, x_RD = self.step(choose(starts_R & valid_R, first, state), byte_R)
            return choose(valid_R, new, state), x_RD

        by_time = (input_ids_BL.T, segment_starts(ids_BL).T, (ids_BL != 0).T)
        state, x_LBD = jax.lax.scan(one, first, by_time)
        return jnp.moveaxis(x_LBD, 0, 1), state


def choose(mask_R: jax.Array, new: Any, old: Any) -> Any:
    """For each leaf of a state, `new` in the rows of the mask and `old` in the others."""

    def one(a, b):
        return jnp.where(mask_R.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(one, new, old)
