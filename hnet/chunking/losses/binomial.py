"""The rate loss of dynamic token pooling and MAGNET."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import counts_by_row, mean_over_routes, mean_over_rows, share_of


def binomial_nll(k: jax.Array, n: jax.Array, rate: jax.Array) -> jax.Array:
    """-log Binomial(k; n, rate) in nats, with log-gamma (arXiv 2211.09761, section 3.1)."""
    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return -(choose + k * jnp.log(rate) + (n - k) * jnp.log1p(-rate))


class Binomial(Loss):
    """-log Binomial(k; n, 1/N) / n for k boundaries among the n positions of a route in a row."""

    is_by_row = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Binomial prior on the number of boundaries in a row (DTP, MAGNET)."""

        weight: float = 1.0
        """weight of the loss relative to cross-entropy"""
        average: Literal["positions", "routes"] = "positions"
        """weight of a route: its number of positions, or equal for all present routes"""

    def __call__(self, x):
        k_BR, n_BR = counts_by_row(x.boundaries, len(x.target_ratio_R))
        nll_BR = binomial_nll(k_BR, n_BR, (1 / x.target_ratio_R)[None, :])
        loss_R = mean_over_rows(nll_BR / jnp.maximum(n_BR, 1.0), n_BR)
        loss_R = share_of(x.own, x.whole) * loss_R
        return mean_over_routes(loss_R, x.own, x.whole, x.config.average)
