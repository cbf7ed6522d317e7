"""The deletion loss of MrT5, whose weight a PI controller sets."""

from dataclasses import dataclass

import jax.numpy as jnp

from hnet.bounds import NotNegative
from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import target_rate


class GateMean(Loss):
    """alpha times the mean gate G <= 0, which pushes towards deletion (arXiv 2410.20771).

    After each update, with the error e = (1 - 1/N) - share of deleted positions:
    P = 0.9 P + 0.1 kp e, I = I + ki e, alpha = max(0, P + I) (jkallini/mrt5). The state is (P, I,
    number of updates).
    """

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Mean of the delete gate; a PI controller of its weight holds the rate (MrT5)."""

        weight: float = 1.0
        """factor on the controlled weight alpha"""
        initial: NotNegative = 0.01
        """alpha in the first update"""
        proportional_gain: NotNegative = 0.5
        """kp"""
        integral_gain: NotNegative = 1e-5
        """ki"""

        def problem_in(self, chunking):
            if chunking.predictor.part.gives_extra == "gates":
                return None
            return (
                f"losses='gate_mean' with predictor={chunking.predictor.name!r}, which has no "
                "gates: use predictor='deletion_gate'"
            )

    def init(self):
        return jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32)

    def __call__(self, x):
        P, I, updates = x.state or self.init()
        alpha = jnp.where(updates == 0, x.config.initial, jnp.maximum(P + I, 0.0))
        return alpha * x.mean(x.boundaries.extra)

    def next_state(self, state, counts, target_ratio_R, config):
        P, I, updates = state
        positions = jnp.maximum(jnp.sum(counts.positions_R), 1.0)
        deleted = 1 - jnp.sum(counts.chunks_R) / positions
        error = 1 - target_rate(counts.positions_R, target_ratio_R) - deleted
        P = 0.9 * P + 0.1 * config.proportional_gain * error
        return P, I + config.integral_gain * error, updates + 1
