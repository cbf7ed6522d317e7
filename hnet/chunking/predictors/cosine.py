"""The official predictor: a boundary where neighbouring encoder states differ."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.nn.layers import matmul
from hnet.nn.parameters import metadata

HIGHEST = jax.lax.Precision.HIGHEST


def half_cosine_distance(q_XD: jax.Array, k_XD: jax.Array) -> jax.Array:
    """(1 - cos(q, k)) / 2 over the last axis, in [0, 1]."""

    def unit(x):  # a zero vector stays zero, so its cosine is 0 and its gradient finite
        norm_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(norm_squared, 1e-24))

    return jnp.clip((1 - jnp.sum(unit(q_XD) * unit(k_XD), axis=-1)) / 2, 0.0, 1.0)


class Cosine(BoundaryPredictor):
    """p_t = (1 - cos(q_{t-1}, k_t)) / 2, float32; q, k: projections of the encoder states.

    goombalab/hnet projects q from t-1 and k from t; arXiv 2507.07955 eq. 4 has the roles swapped.
    """

    alignments = ("start",)  # p_t compares t-1 with t: the boundary lies before position t
    target_is_static = False

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Cosine distance of neighbouring encoder states (H-Net)."""

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)

        def identity(_key, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        self.q_proj_layer, self.k_proj_layer = (
            nnx.Linear(
                place.d_model, place.d_model, use_bias=False, kernel_init=identity, rngs=rngs,
                kernel_metadata=metadata("embed out"),
                dot_general=lambda x, weight, *_, **__: matmul(x, weight, HIGHEST),
            )
            for _ in range(2)
        )  # fmt: skip

    def score(self, previous_XD: jax.Array, h_XD: jax.Array) -> jax.Array:
        """p of positions, from their states and the states of the positions before them."""
        return half_cosine_distance(self.q_proj_layer(previous_XD), self.k_proj_layer(h_XD))

    def init(self, rows):
        return jnp.zeros((rows, self.q_proj_layer.in_features), jnp.float32)

    def step(self, previous_RD, x):
        return x.h_RD, Prediction(prob=self.per_group_step(x, previous_RD, x.h_RD))

    def __call__(self, rows):
        previous_BLD = jnp.pad(rows.h_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return Prediction(prob=self.per_group(rows.context, previous_BLD, rows.h_BLD))

    def after(self, rows):
        return rows.at_end(rows.h_BLD)
