"""A custom boundary predictor: the longer a chunk has lasted, the more likely its end."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.nn.parameters import parameter


class Hazard(BoundaryPredictor):
    """logit_t = w . h_t + bias + growth * log(1 + n_t), n_t positions since the last boundary."""

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Linear in the encoder state, with a hazard that grows with the length of the chunk."""

        traced = ("growth",)  # a sweep over growth compiles once

        growth: float = 1.0
        """weight of the logarithm of the number of positions since the last boundary"""

        def problem(self):
            return None if self.growth >= 0 else f"growth={self.growth}: use 0 or more"

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        weight_D = 0.02 * jax.random.normal(rngs.params(), (place.d_model,), jnp.float32)
        self.weight = parameter(weight_D, "embed")
        self.bias = parameter(jnp.zeros((1,), jnp.float32), "out", decay=False)

    def start_at(self, rates):
        logit = jnp.log(rates[0]) - jnp.log1p(-rates[0])
        self.bias[...] = jnp.full_like(self.bias[...], logit)

    def init(self, rows):
        return jnp.zeros((rows,), jnp.float32)

    def step(self, since_R, x):
        growing_R = x.config.growth * jnp.log1p(since_R)
        logit_R = jnp.sum(x.h_RD * self.weight[...][None], axis=-1) + self.bias[...] + growing_R
        return jnp.where(logit_R > 0, 0.0, since_R + 1), Prediction(logit_R)
