"""Zonkey's losses against chunks that are too long or too short, from the hazard p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.bounds import Count
from hnet.chunking.part import Loss, LossConfig

LEAST = 1e-7  # clip of p before its logarithm


def no_start(p_BL: jax.Array, segment_ids_BL: jax.Array, width: int) -> jax.Array:
    """P(no chunk starts in the `width` positions up to and including each one), (B, L).

    0 where these positions are not all in one segment (ARozental/Zonkey).
    """
    log_keep_BL = jnp.log1p(-jnp.clip(p_BL, LEAST, 1 - LEAST))
    pad = ((0, 0), (width - 1, 0))
    window = (1, min(width, p_BL.shape[1] + width - 1))
    sums_BL = jax.lax.reduce_window(
        jnp.pad(log_keep_BL, pad), 0.0, jax.lax.add, window, (1, 1), "VALID"
    )
    first_BL = jnp.pad(segment_ids_BL, pad)[:, : p_BL.shape[1]]
    inside_BL = (first_BL == segment_ids_BL) & (segment_ids_BL != 0)
    return jnp.where(inside_BL, jnp.exp(sums_BL), 0.0)


class Hazard(Loss):
    """long * sum over w in (W, W + 1, W + 2) of P(no start in w positions) + short * P(length < C).

    W = longest, C = shortest. P(length < C) at t is p_t times the probability that a chunk starts
    in the C - 1 positions after t. Both are means over all positions; Zonkey's code divides by the
    number of windows. (arXiv 2601.21768; ARozental/Zonkey.)
    """

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Losses against chunks that are too long or too short (Zonkey)."""

        weight: float = 1.0
        """weight of the loss relative to cross-entropy"""
        longest: Count = 27
        """W: length up to which a chunk is not too long"""
        shortest: Count = 4
        """C: length from which on a chunk is not too short"""
        long: float = 10.0
        """weight of the probability of chunks that are too long"""
        short: float = 10.0
        """weight of the probability of chunks that are too short"""

        def problem(self):
            if not 1 <= self.shortest <= self.longest:
                return (
                    f"shortest={self.shortest}, longest={self.longest}: use at least 1 and no "
                    "shorter longest"
                )
            if min(self.long, self.short) < 0:
                return f"long={self.long}, short={self.short}: use 0 or more"
            return super().problem()

    def __call__(self, x):
        config, boundaries = x.config, x.boundaries
        ids_BL, p_BL = boundaries.segment_ids_BL, boundaries.boundary_prob_BL
        if boundaries.boundary_logit_BL is not None:  # forced boundaries have p = 1
            p_BL = jax.nn.sigmoid(boundaries.boundary_logit_BL)
        too_long_BL = sum(no_start(p_BL, ids_BL, config.longest + more) for more in range(3))
        loss = config.long * x.mean(too_long_BL)
        if config.shortest == 1:
            return loss
        width = config.shortest - 1
        inside_BL = no_start(p_BL, ids_BL, width)
        short_BL = jnp.where(inside_BL > 0, 1 - inside_BL, 0.0)
        start_BL = jnp.pad(p_BL[:, :-width], ((0, 0), (width, 0)))[:, : p_BL.shape[1]]
        same_BL = jnp.pad(ids_BL[:, width:] == ids_BL[:, :-width], ((0, 0), (width, 0)))
        same_BL = same_BL[:, : p_BL.shape[1]]
        return loss + config.short * x.mean(jnp.where(same_BL, start_BL * short_BL, 0.0))
