"""Predictors that read a causal convolution of the encoder states: integrate and fire, hazard."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.bounds import Count
from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import BoundaryPredictor, PredictorConfig
from hnet.chunking.pools.integrate import Weights
from hnet.chunking.predictors.mlp import hard_bernoulli
from hnet.nn.cache import last_positions
from hnet.nn.layers import INIT_STD, segment_starts
from hnet.nn.parameters import metadata, parameter

FIRE = 1 << 20  # weights are multiples of 1 / FIRE, so that their sums are exact


class Convolved(BoundaryPredictor):
    """logit = linear(relu(h + depthwise causal convolution of h)), float32.

    (CifPredictor of modelscope/FunASR with no right context.) Documents see only themselves.
    """

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        D, W = place.d_model, config.taps
        taps = jax.random.normal(rngs.params(), (W, D), jnp.float32) * W**-0.5
        self.taps = parameter(taps, "taps channels", decay=False)
        self.taps_bias = parameter(jnp.zeros((D,), jnp.float32), "channels", decay=False)
        self.out = nnx.Linear(
            D, 1, kernel_init=nnx.initializers.normal(INIT_STD),
            precision=jax.lax.Precision.HIGHEST, rngs=rngs,
            kernel_metadata=metadata("embed out"), bias_metadata=metadata("out", decay=False),
        )  # fmt: skip

    def score(self, *earlier_XD: jax.Array) -> jax.Array:
        """Logits of positions, from their states and those of 1, 2, ... positions before."""
        over_channels = (1,) * (earlier_XD[0].ndim - 1) + (-1,)
        convolved_XD = earlier_XD[0] + self.taps_bias[...].reshape(over_channels)
        for x_XD, tap_D in zip(earlier_XD, self.taps[...][::-1]):
            convolved_XD = convolved_XD + x_XD * tap_D.reshape(over_channels)
        return self.out(jax.nn.relu(convolved_XD))[..., 0]

    def logits(self, rows) -> jax.Array:
        ids_BL, earlier = rows.context.segment_ids_BL, [rows.h_BLD]
        for back in range(1, self.config.taps):
            pad = ((0, 0), (back, 0))
            same_BL = jnp.pad(ids_BL[:, back:] == ids_BL[:, :-back], pad)[:, : ids_BL.shape[1]]
            before_BLD = jnp.pad(rows.h_BLD[:, :-back], (*pad, (0, 0)))[:, : ids_BL.shape[1]]
            earlier.append(jnp.where(same_BL[..., None], before_BLD, 0.0))
        return self.per_group(rows.context, *earlier)

    def init(self, rows):
        return jnp.zeros((rows, self.config.taps - 1, self.taps.shape[-1]), jnp.float32)

    def logits_step(self, past_RWD, x) -> tuple[jax.Array, jax.Array]:
        """(past of the next position, logits (R,))."""
        past_RWD = jnp.concatenate([past_RWD, x.h_RD[:, None]], axis=1)
        earlier = [past_RWD[:, -1 - back] for back in range(self.config.taps)]
        return past_RWD[:, 1:], self.per_group_step(x, *earlier)

    def past(self, rows) -> jax.Array:
        return last_positions(rows.h_BLD, rows.lengths_B, self.config.taps - 1)

    def passes_gradient(self, config):
        return False


class CIF(Convolved):
    """Weights w_t = sigmoid(logit_t) are added up; a boundary lies where the sum reaches 1.

    The sum goes on from what exceeds 1. Weights are rounded to multiples of 2^-20, so that sums of
    whole rows and of streams are equal. Unlike its code, weights are not scaled to the target
    number of chunks in training: that is not causal (arXiv 1905.11235; modelscope/FunASR).
    """

    alignments = ("end",)
    gives_extra = "weights"

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Sum of weights that fires at 1 (CIF)."""

        taps: Count = 3
        """number of positions that the convolution reads, the position itself included"""

        def problem(self):
            return None if self.taps >= 1 else f"taps={self.taps}: use 1 or more"

        def problem_in(self, chunking):
            fixed = {
                "null": "learned",
                "hold_rate": False,
                "max_chunk_len": 0,
                "at_characters": False,
            }
            for name, works in fixed.items():
                if (value := getattr(chunking, name)) != works:
                    return f"{name}={value!r} with predictor='cif': use {works!r}"
            return None

    def start_at(self, rates):
        logits = [math.log(rate) - math.log1p(-rate) for rate in rates]
        self.out.bias[...] = jnp.asarray(logits, jnp.float32).reshape(self.out.bias.shape)

    def init(self, rows):
        return super().init(rows), jnp.zeros((rows,), jnp.int32)

    def step(self, state, x):
        past_RWD, before_R = state
        past_RWD, logit_R = self.logits_step(past_RWD, x)
        weight_R, rounded_R = rounded(jax.nn.sigmoid(logit_R))
        sum_R = before_R + rounded_R
        fires_R = (sum_R >= FIRE).astype(jnp.float32)
        extra = Weights(weight_R, before_R.astype(jnp.float32) / FIRE)
        return (past_RWD, sum_R % FIRE), Prediction(prob=fires_R, extra=extra)

    def __call__(self, rows):
        return fired(jax.nn.sigmoid(self.logits(rows)), rows.context.segment_ids_BL)

    def after(self, rows):
        rounded_BL = rounded(jax.nn.sigmoid(self.logits(rows)))[1]
        own_BL = jnp.where(rows.context.segment_ids_BL != 0, rounded_BL, 0)
        return self.past(rows), jnp.sum(own_BL, axis=1, dtype=jnp.int32) % FIRE


def rounded(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(weight rounded to a multiple of 1 / FIRE with the gradient of the weight, the multiple)."""
    multiple = jnp.round(jax.lax.stop_gradient(weight) * FIRE).astype(jnp.int32)
    value = multiple.astype(jnp.float32) / FIRE
    return value + (weight - jax.lax.stop_gradient(weight)), multiple


def fired(weight_BL: jax.Array, segment_ids_BL: jax.Array) -> Prediction:
    """Boundaries where the sum of weights passes a whole number, and the weights for the pool.

    Sums of integers wrap around, which does not change their remainder by FIRE, a power of two.
    """
    weight_BL, rounded_BL = rounded(weight_BL)
    starts_BL = segment_starts(segment_ids_BL)

    def before(values_BL):  # exclusive sum within the segment
        sum_BL = jnp.cumsum(values_BL, axis=1, dtype=values_BL.dtype) - values_BL
        index_BL = jnp.where(starts_BL, jnp.arange(sum_BL.shape[1], dtype=jnp.int32)[None], 0)
        first_BL = jax.lax.cummax(index_BL, axis=1)
        return sum_BL - jnp.take_along_axis(sum_BL, first_BL, axis=1)

    before_BL = before(rounded_BL) & (FIRE - 1)
    fires_BL = (before_BL + rounded_BL >= FIRE).astype(jnp.float32)
    real_BL = before(weight_BL)
    value_BL = before_BL.astype(jnp.float32) / FIRE + (real_BL - jax.lax.stop_gradient(real_BL))
    return Prediction(prob=fires_BL, extra=Weights(weight_BL, value_BL))


class Hazard(Convolved):
    """p_t = sigmoid(l0 + logit_t / sqrt(D)), l0 = logit(2 / longest).

    The probability that a chunk starts at t, given that none started since the last one (Zonkey,
    arXiv 2601.21768; ARozental/Zonkey). Training draws starts with probability p; otherwise a
    chunk starts where p > 0.5. Its convolutions are not causal; this one is. Use max_chunk_len =
    longest, so that no chunk is longer.
    """

    alignments = ("start",)

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Hazard of a new chunk, drawn in training (Zonkey)."""

        taps: Count = 9
        """number of positions that the convolution reads, the position itself included"""
        longest: Count = 27
        """chunk length whose half is the initial mean length"""

        def problem(self):
            if self.taps < 1:
                return f"taps={self.taps}: use 1 or more"
            return None if self.longest > 2 else f"longest={self.longest}: use 3 or more"

    def _logits(self, logit_X):
        first = math.log(2 / self.config.longest) - math.log1p(-2 / self.config.longest)
        return first + logit_X / math.sqrt(self.taps.shape[-1])

    def step(self, past_RWD, x):
        past_RWD, logit_R = self.logits_step(past_RWD, x)
        return past_RWD, Prediction(self._logits(logit_R))

    def __call__(self, rows):
        return Prediction(self._logits(self.logits(rows)))

    def after(self, rows):
        return self.past(rows)

    def relax(self, logit_BL, config, key):
        return hard_bernoulli(logit_BL, key)
