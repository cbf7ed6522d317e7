"""A loss for equal numbers of chunks in text that says the same on each route."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import mean_over_routes, mean_prob, share_of


class Parity(Loss):
    """Squared relative distance of each route's chunks per sentence from their mean.

    The target ratios N say how many bytes of each route carry the same content, as
    `experiments.calibrate` finds them on aligned text: a sentence that has N_r bytes on each route
    r has c_r = F_r N_r chunks there. The loss is the mean over the present routes of
    (c_r / mean c - 1)^2, whatever the mean is. As in the ratio loss, only the mean probability G
    carries a gradient: 2 (c_r / mean c - 1) N_r / mean c for G_r.
    """

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Equal chunks on aligned sentences: the spread of F N over routes."""

        weight: float = 0.03
        """weight of the loss relative to cross-entropy"""

        def problem_in(self, chunking):
            if chunking.routes < 2:
                return "losses: parity with routes=1 has nothing to make equal: use 2 or more"
            return None

    def __call__(self, x):
        own, whole, N_R = x.own, x.whole, x.target_ratio_R
        is_present_R = whole.positions_R > 0
        chunks_R = whole.rate_R * N_R
        mean = jnp.sum(chunks_R) / jnp.maximum(jnp.sum(is_present_R, dtype=jnp.float32), 1.0)
        off_R = chunks_R / jnp.maximum(mean, 1e-6) - 1
        slope_R = jax.lax.stop_gradient(2 * off_R * N_R / jnp.maximum(mean, 1e-6))
        G_R = mean_prob(x.boundaries, own)
        loss_R = jax.lax.stop_gradient(off_R**2) + slope_R * (G_R - jax.lax.stop_gradient(G_R))
        return mean_over_routes(share_of(own, whole) * loss_R, own, whole, "routes")
