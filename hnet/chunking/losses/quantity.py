"""The quantity loss of integrate and fire."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import (
    mean_over_routes,
    mean_over_rows,
    positions_on_route,
    share_of,
    sums_over,
)


class Quantity(Loss):
    """|sum of weights - n / N| / n for the n positions of a route in a row (arXiv 1905.11235).

    The code of FunASR does not divide by n: its number of chunks is that of the labels.
    """

    is_by_row = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Distance of the sum of weights from the target number of chunks (CIF)."""

        weight: float = 1.0
        """weight of the loss relative to cross-entropy"""
        average: Literal["positions", "routes"] = "positions"
        """weight of a route: its number of positions, or equal for all present routes"""

        def problem_in(self, chunking):
            if chunking.predictor.part.gives_extra == "weights":
                return None
            return (
                f"losses='quantity' with predictor={chunking.predictor.name!r}, which has no "
                "weights: use predictor='cif', or another loss"
            )

    def __call__(self, x):
        on_BLR = positions_on_route(x.boundaries, len(x.target_ratio_R))
        n_BR = jnp.sum(on_BLR, axis=1, dtype=jnp.float32)
        sum_BR = sums_over(x.boundaries.extra.weight, on_BLR, (1,))
        error_BR = jnp.abs(sum_BR - n_BR / x.target_ratio_R[None, :]) / jnp.maximum(n_BR, 1.0)
        loss_R = share_of(x.own, x.whole) * mean_over_rows(error_BR, n_BR)
        return mean_over_routes(loss_R, x.own, x.whole, x.config.average)
