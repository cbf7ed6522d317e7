"""The policy gradient of RL tokenisation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.part import Loss, LossConfig
from hnet.nn.layers import segment_starts


def returns(reward_BL: jax.Array, segment_ids_BL: jax.Array, discount: float) -> jax.Array:
    """A_t = r_{t+1} + discount r_{t+2} + ... within the segment, (B, L)."""
    has_next_BL = jnp.pad(segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1], ((0, 0), (0, 1)))
    next_BL = jnp.where(has_next_BL, jnp.pad(reward_BL[:, 1:], ((0, 0), (0, 1))), 0.0)

    def both(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    factors = jnp.where(has_next_BL, discount, 0.0), next_BL
    return jax.lax.associative_scan(both, factors, reverse=True, axis=1)[1]


class PolicyGradient(Loss):
    """-log pi(a_t) A_t, cross-entropy of the reward head, and a pull to the target rate.

    a_t: the boundary that was drawn. A_t: discounted sum of the rewards after t, minus its mean
    over the row. Reward of a byte: how many nats less than the head of the encoder states the
    network needs for it. The pull is mean logit * (F - 1 / N), F: boundary rate of the batch.
    (arXiv 2602.13940, which has public code that was not run; its advantage is centred over the
    batch at the same index, with F the mean of p.)
    """

    reads_next_byte = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Policy gradient with a reward of nats saved (RL tokenisation)."""

        weight: float = 0.01
        """weight of the loss relative to cross-entropy"""
        discount: float = 0.99
        """factor of a reward per position of its distance"""
        head: float = 10.0
        """weight of the reward head's cross-entropy within this loss"""
        rate: float = 1.0
        """weight of the pull to the target rate within this loss"""

        def problem(self):
            if not 0 <= self.discount < 1:
                return f"discount={self.discount}: use a factor from 0 to below 1"
            if min(self.head, self.rate) < 0:
                return f"head={self.head}, rate={self.rate}: use 0 or more"
            return super().problem()

        def problem_in(self, chunking):
            if chunking.predictor.part.gives_extra == "rewards":
                return None
            return (
                f"losses='policy_gradient' with predictor={chunking.predictor.name!r}, which has "
                "no reward head: use predictor='policy', or another loss"
            )

    def __call__(self, x):
        config, boundaries = x.config, x.boundaries
        ids_BL, logit_BL = boundaries.segment_ids_BL, boundaries.boundary_logit_BL
        valid_BL, starts_BL = ids_BL != 0, segment_starts(ids_BL)
        early_BL = boundaries.extra
        reward_BL = jnp.where(valid_BL & ~starts_BL, early_BL - x.next_byte_nll_BL, 0.0)
        return_BL = returns(jax.lax.stop_gradient(reward_BL), ids_BL, config.discount)
        n_B1 = jnp.maximum(jnp.sum(valid_BL, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
        mean_B1 = jnp.sum(jnp.where(valid_BL, return_BL, 0.0), axis=1, keepdims=True) / n_B1
        drawn_BL = jax.lax.stop_gradient(boundaries.boundary_ste_BL) > 0.5
        surprise_BL = jax.nn.softplus(jnp.where(drawn_BL, -logit_BL, logit_BL))
        decides_BL = jnp.ones_like(starts_BL) if x.has_null_chunk else ~starts_BL
        policy = x.mean(jnp.where(decides_BL, surprise_BL * (return_BL - mean_B1), 0.0))
        rates_R = jnp.sum(x.whole.chunks_R) / jnp.maximum(jnp.sum(x.whole.positions_R), 1.0)
        shares_R = x.whole.positions_R / jnp.maximum(jnp.sum(x.whole.positions_R), 1.0)
        target = jnp.sum(shares_R / x.target_ratio_R)
        pull = x.mean(logit_BL) * jax.lax.stop_gradient(rates_R - target)
        return policy + config.head * x.mean(early_BL) + config.rate * pull
