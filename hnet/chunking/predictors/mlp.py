"""The predictor of dynamic token pooling: a relaxed Bernoulli of an MLP."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.nn.layers import INIT_STD
from hnet.nn.parameters import metadata


def relaxed_bernoulli(
    logit_BL: jax.Array, temperature: jax.Array | float, key: jax.Array | None
) -> jax.Array:
    """sigmoid((logit + noise) / temperature), noise = log u - log(1 - u); no noise if key is None.

    The sample exceeds 0.5 with probability sigmoid(logit) (arXiv 1611.00712); without noise, if
    and only if p > 0.5.
    """
    if key is not None:
        logit_BL = logit_BL + jax.random.logistic(key, logit_BL.shape, jnp.float32)
    return jax.nn.sigmoid(logit_BL / temperature)


def hard_bernoulli(logit_BL: jax.Array, key: jax.Array | None) -> jax.Array:
    """1 with probability sigmoid(logit), else 0; without a key 1 where the logit is above 0."""
    if key is not None:
        logit_BL = logit_BL + jax.random.logistic(key, logit_BL.shape, jnp.float32)
    return (logit_BL > 0).astype(jnp.float32)


class MLP(BoundaryPredictor):
    """logit = fc2(gelu(fc1(h))), float32 (arXiv 2211.09761).

    The last bias is initialised to the logit of its script group's target rate 1/N. With 0 (half of
    all positions are boundaries), training towards a small rate overshoots to no boundaries at all.
    """

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """MLP of the encoder state, sampled as a relaxed Bernoulli (DTP, MAGNET, FlexiTokens)."""

        traced = ("temperature",)

        width: int = 0
        """hidden width; 0 = 4 * d_model"""
        temperature: float = 0.5
        """temperature of the relaxed Bernoulli"""
        straight_through: bool = True
        """straight-through gradient through b, from a sample with noise in training; False: p > 0.5
        and no gradient through b, for predictors trained on labels"""
        reference_noise_at_evaluation: bool = False
        """noise in evaluation too, as in the dynamic-pooling code (its paper rounds)"""

        def problem(self):
            if not self.temperature > 0:
                return f"temperature={self.temperature}: use a number above 0"
            if self.width < 0:
                return f"width={self.width}: use 1 or more, or 0 for 4 * d_model"
            return None

        def streaming_problem(self):
            if self.reference_noise_at_evaluation:
                return (
                    "reference_noise_at_evaluation=True draws the boundaries of a text anew each "
                    "time it is read, so no text can be continued: set it to False"
                )
            return None

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)

        def layer(d_in, d_out, axes):
            return nnx.Linear(
                d_in, d_out, kernel_init=nnx.initializers.normal(INIT_STD),
                precision=jax.lax.Precision.HIGHEST, rngs=rngs,
                kernel_metadata=metadata(axes), bias_metadata=metadata("out", decay=False),
            )  # fmt: skip

        hidden = config.width or 4 * place.d_model
        self.fc1 = layer(place.d_model, hidden, "embed_fused out")
        self.fc2 = layer(hidden, 1, "mlp out")

    def start_at(self, rates):
        logits = [math.log(rate) - math.log1p(-rate) for rate in rates]
        bias = self.fc2.bias
        bias[...] = jnp.asarray(logits, jnp.float32).reshape(bias.shape)

    def score(self, h_XD: jax.Array) -> jax.Array:
        """Logits of p for positions, from their states."""
        return self.fc2(jax.nn.gelu(self.fc1(h_XD), approximate=False))[..., 0]

    def step(self, state, x):
        return state, Prediction(self.per_group_step(x, x.h_RD))

    def __call__(self, rows):
        return Prediction(self.per_group(rows.context, rows.h_BLD))

    def passes_gradient(self, config):
        return config.straight_through

    def relax(self, logit_BL, config, key):
        if not config.straight_through:
            return None
        if key is None and config.reference_noise_at_evaluation:
            key = jax.random.key(0)
        return relaxed_bernoulli(logit_BL, config.temperature, key)
