"""The rate loss of FlexiTokens: a band of rates without penalty."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import counts_by_row, mean_over_routes, mean_over_rows, share_of


def hinge(rate: jax.Array, highest: jax.Array, lowest: jax.Array) -> jax.Array:
    """Distance of the rate from [lowest, highest]; no gradient inside (arXiv 2507.12720)."""
    return jax.nn.relu(rate - highest) + jax.nn.relu(lowest - rate)


class Hinge(Loss):
    """Distance of a row's rate from [lowest, 1/N] on each route.

    lowest = 1/N - lambda * sigma of the route if sigmas are given (owos/flexitokens), else
    (1 - band) / N.
    """

    is_by_row = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Hinge with an upper rate per script group and a band below it (FlexiTokens)."""

        weight: float = 1.0
        """weight of the loss relative to cross-entropy"""
        average: Literal["positions", "routes"] = "positions"
        """weight of a route: its number of positions, or equal for all present routes"""
        band: float = 0.2
        """width of the penalty-free band below 1/N, as a share of 1/N; used if sigmas is empty"""
        sigmas: tuple[float, ...] = ()
        """standard deviation of the boundary rate per route; empty = use band"""
        num_sigmas: float = 3.0
        """lambda: width of the band in standard deviations"""

        def problem(self):
            if not 0 <= self.band < 1:
                return f"band={self.band}: use a share from 0 to below 1"
            if min(self.sigmas, default=0.0) < 0 or self.num_sigmas < 0:
                return f"sigmas={self.sigmas}, num_sigmas={self.num_sigmas}: use 0 or more"
            return super().problem()

        def problem_in(self, chunking):
            if len(self.sigmas) not in (0, chunking.routes):
                return f"losses: sigmas={self.sigmas} for routes={chunking.routes}: give one each"
            return None

    def __call__(self, x):
        config, highest_R = x.config, 1 / x.target_ratio_R
        k_BR, n_BR = counts_by_row(x.boundaries, len(x.target_ratio_R))
        if config.sigmas:
            sigma_R = jnp.asarray(config.sigmas, jnp.float32)
            lowest_R = highest_R - config.num_sigmas * sigma_R
        else:
            lowest_R = highest_R * (1 - config.band)
        rate_BR = k_BR / jnp.maximum(n_BR, 1.0)
        loss_R = mean_over_rows(hinge(rate_BR, highest_R[None, :], lowest_R[None, :]), n_BR)
        loss_R = share_of(x.own, x.whole) * loss_R
        return mean_over_routes(loss_R, x.own, x.whole, config.average)
