"""The official rate loss."""

from dataclasses import dataclass
from typing import Literal

import jax

from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import mean_over_routes, mean_prob, share_of


def ratio_loss(F: jax.Array, G: jax.Array, target_ratio: jax.Array | float) -> jax.Array:
    """N / (N-1) * ((N-1) F G + (1-F) (1-G)), 1 at F = G = 1/N (arXiv 2507.07955, eq. 10).

    Only G carries a gradient: N / (N-1) * (N F - 1).
    """
    N = target_ratio
    return N / (N - 1) * ((N - 1) * F * G + (1 - F) * (1 - G))


class Ratio(Loss):
    """Ratio loss of each route, with F and G over all rows, averaged over routes."""

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Ratio loss of H-Net: both the rate F and the mean probability G at 1/N."""

        weight: float = 0.03
        """weight of the loss relative to cross-entropy (alpha)"""
        average: Literal["positions", "routes"] = "positions"
        """weight of a route: its number of positions, or equal for all present routes"""

    def __call__(self, x):
        own, whole = x.own, x.whole  # F of the whole batch: the loss is linear in G
        loss_R = ratio_loss(whole.rate_R, mean_prob(x.boundaries, own), x.target_ratio_R)
        return mean_over_routes(share_of(own, whole) * loss_R, own, whole, x.config.average)
