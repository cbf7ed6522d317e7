"""The delete gate of MrT5: positions that it keeps are the boundaries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.nn.parameters import metadata, parameter

EPS = 1e-6  # T5's norm


class DeletionGate(BoundaryPredictor):
    """G = k sigmoid(-logit), logit = w norm(h) + b; kept if G > k / 2 (arXiv 2410.20771).

    In training, deletion is soft: every position gets a slot of the main network, and G is added to
    the attention scores of its key. In evaluation and in a stream the deleted positions get no
    slot. In both forms a position reads the last kept one, so they differ only in how far k sigmoid
    is from 0 or -inf. So the main network may only have layers of attention.
    """

    alignments = ("start",)
    gives_extra = "gates"

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Delete gate; kept positions are boundaries (MrT5)."""

        scale: float = -30.0
        """k: bias on the attention scores of a deleted position's key"""
        soft: bool = True
        """soft deletion in training, by a bias on keys; False: deleted positions are removed in
        training too, and the gate has no gradient from cross-entropy"""

        def problem(self):
            return None if self.scale < 0 else f"scale={self.scale}: use a number below 0"

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.scale = parameter(jnp.ones((place.d_model,), jnp.float32), "channels", decay=False)
        self.feed_forward = nnx.Linear(
            place.d_model, 1, kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.ones, precision=jax.lax.Precision.HIGHEST, rngs=rngs,
            kernel_metadata=metadata("embed out"), bias_metadata=metadata("out", decay=False),
        )  # fmt: skip

    def score(self, h_XD: jax.Array) -> jax.Array:
        """Logit of keeping each position, from its state."""
        mean = jnp.mean(jnp.square(h_XD), axis=-1, keepdims=True)
        scale_D = self.scale[...].reshape((1,) * (h_XD.ndim - 1) + (-1,))
        return self.feed_forward(h_XD * jax.lax.rsqrt(mean + EPS) * scale_D)[..., 0]

    def step(self, state, x):
        return state, Prediction(self.per_group_step(x, x.h_RD))

    def __call__(self, rows):
        logit_BL = self.per_group(rows.context, rows.h_BLD)
        return Prediction(logit_BL, extra=gate(logit_BL, rows.config.scale))

    @classmethod
    def biases_keys(cls, config):
        return config.soft

    def key_bias(self, prediction, config, training):
        return gate(prediction.logit, config.scale) if training and config.soft else None


def gate(logit: jax.Array, scale: float) -> jax.Array:
    """G, in [k, 0]: 0 keeps a position."""
    return scale * jax.nn.sigmoid(-logit)
