"""SOMBRERO's pool: states are smoothed by the predictor's confidence before one is selected."""

from dataclasses import dataclass

import jax.numpy as jnp

from hnet.chunking.ema import ema
from hnet.chunking.part import Pool, PoolConfig


class Smoothed(Pool):
    """xs_t = c_t h_t + (1 - c_t) xs_{t-1} at the boundary, c_t = max(p_t, 1 - p_t).

    xs = 0 before a document. (arXiv 2601.22805; it has no public code.)
    """

    alignments = ("start", "end")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Encoder state at the boundary, smoothed by confidence (SOMBRERO)."""

    def init(self, rows, d_model):
        return jnp.zeros((rows, d_model), jnp.float32)

    def step(self, smooth_RD, x):
        c_R1 = jnp.maximum(x.prob_R, 1 - x.prob_R)[:, None]
        smooth_RD = c_R1 * x.h_RD + (1 - c_R1) * smooth_RD
        return smooth_RD, smooth_RD

    def restart(self, state, rows, d_model):
        return state

    def __call__(self, rows, boundaries, slots):
        return slots.gather(self._smooth(rows, boundaries))

    def after(self, rows, boundaries):
        return rows.at_end(self._smooth(rows, boundaries))

    def _smooth(self, rows, boundaries):
        p_BL = boundaries.boundary_prob_BL
        ids_BL = rows.context.segment_ids_BL
        return ema(rows.h_BLD, jnp.maximum(p_BL, 1 - p_BL), ids_BL)
