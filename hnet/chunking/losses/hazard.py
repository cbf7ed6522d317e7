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


def too_short(p_BL: jax.Array, segment_ids_BL: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """(P(a chunk starts at t and another one in the `width` positions after t), P(starts at t)).

    Each (B, L), written at position t + width, and 0 where t and t + width are not in one segment
    (ARozental/Zonkey).
    """
    inside_BL = no_start(p_BL, segment_ids_BL, width)
    pad = ((0, 0), (width, 0))
    start_BL, first_BL = (jnp.pad(x_BL, pad)[:, : p_BL.shape[1]] for x_BL in (p_BL, segment_ids_BL))
    same_BL = (first_BL == segment_ids_BL) & (segment_ids_BL != 0)
    start_BL = jnp.where(same_BL, start_BL, 0.0)
    return start_BL * (1 - inside_BL), start_BL


class Hazard(Loss):
    """long * (sum of P(no start in w positions)) + short * (sum of P(length <= v)).

    The sums have three terms each: w = W, W + 1, W + 2 and v = C - 1, C - 2, C - 3, at least 1,
    where W = longest and C = shortest. P(length <= v) at t is p_t times the probability that a
    chunk starts in the v positions after t. All are means over all positions; Zonkey's code divides
    the first by the number of windows and the second by the sum of p_t over windows. (arXiv
    2601.21768; ARozental/Zonkey.)
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
        widths = (max(config.shortest - less, 1) for less in (1, 2, 3))
        short_BL = sum(too_short(p_BL, ids_BL, width)[0] for width in widths)
        return loss + config.short * x.mean(short_BL)
