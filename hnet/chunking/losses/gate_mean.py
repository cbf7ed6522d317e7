"""The losses of MrT5 on its delete gates: mean, with a PI controller as weight, and entropy."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.bounds import NotNegative
from hnet.chunking.part import Loss, LossConfig
from hnet.chunking.rates import target_rate


def _without_gates(name, chunking) -> str | None:
    if chunking.predictor.part.gives_extra == "gates":
        return None
    return (
        f"losses={name!r} with predictor={chunking.predictor.name!r}, which has no gates: use "
        "predictor='deletion_gate'"
    )


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
            return _without_gates("gate_mean", chunking)

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


def entropy(p: jax.Array) -> jax.Array:
    """Entropy of a Bernoulli variable in nats; 0, with gradient 0, within 1e-6 of 0 and 1."""
    inside = (p > 1e-6) & (p < 1 - 1e-6)
    p = jnp.where(inside, p, 0.5)
    return jnp.where(inside, -p * jnp.log(p) - (1 - p) * jnp.log1p(-p), 0.0)


class GateEntropy(Loss):
    """Mean of H(e^G) minus H of the row's mean of e^G, where H is the entropy of a Bernoulli.

    e^G is the factor that a gate G gives the attention to its position. The first term makes gates
    certain, the second keeps them from being all equal (the entropy regularizer of jkallini/mrt5;
    arXiv 2410.20771).
    """

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Certain and different delete gates (MrT5's entropy regularizer)."""

        weight: float = 0.1
        """weight of the loss relative to cross-entropy"""

        def problem_in(self, chunking):
            return _without_gates("gate_entropy", chunking)

    def __call__(self, x):
        valid_BL = x.boundaries.segment_ids_BL != 0
        kept_BL = jnp.where(valid_BL, jnp.exp(x.boundaries.extra), 0.0)
        n_B1 = jnp.maximum(jnp.sum(valid_BL, 1, keepdims=True, dtype=jnp.float32), 1.0)
        mean_B1 = jnp.sum(kept_BL, 1, keepdims=True) / n_B1
        return x.mean(entropy(kept_BL) - entropy(mean_B1))
