"""A pool by attention: one learned query over the positions of a chunk."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from hnet.chunking.ema import ema
from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids, running_mean
from hnet.nn.parameters import parameter

MOST = 30.0  # bound of a score, so that weights and their sums fit float32


class Attention(Pool):
    """sum_t softmax(q . h_t / sqrt(D)) h_t over the chunk (lucidrains/h-net-dynamic-chunking).

    q is a parameter that starts at 0, so the pool starts as the mean. Scores s are bounded to 30
    tanh(s / 30).
    """

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Attention of a learned query over the chunk."""

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.query = parameter(jnp.zeros((place.d_model,), jnp.float32), "channels", decay=False)

    def weights(self, h_XD):
        """exp of the score of each position."""
        score_X = (h_XD @ self.query[...]) / math.sqrt(h_XD.shape[-1])
        return jnp.exp(MOST * jnp.tanh(score_X / MOST))

    def init(self, rows, d_model):
        return jnp.zeros((rows, d_model), jnp.float32), jnp.zeros((rows,), jnp.float32)

    def step(self, state, x):
        mean_RD, total_R = state
        weight_R = self.weights(x.h_RD)
        total_R = total_R + weight_R
        share_R1 = (weight_R / total_R)[:, None]
        mean_RD = share_R1 * x.h_RD + (1 - share_R1) * mean_RD
        return (mean_RD, total_R), mean_RD

    def __call__(self, rows, boundaries, slots):
        return slots.gather(self._means(rows, boundaries)[0])

    def after(self, rows, boundaries):
        mean_BLD, total_BL = self._means(rows, boundaries)
        closed_BL = boundaries.boundary_mask_BL
        mean_BLD = jnp.where(closed_BL[..., None], 0.0, mean_BLD)
        return rows.at_end(mean_BLD), rows.at_end(jnp.where(closed_BL, 0.0, total_BL))

    def _means(self, rows, boundaries):
        ids_BL = chunk_ids(boundaries.boundary_mask_BL, rows.context.segment_ids_BL)
        weight_BL = self.weights(rows.h_BLD)
        mean_BL1, count_BL = running_mean(weight_BL[..., None], ids_BL)
        total_BL = mean_BL1[..., 0] * count_BL
        return ema(rows.h_BLD, jnp.minimum(weight_BL / total_BL, 1.0), ids_BL), total_BL
