"""SOMBRERO's confidence-alignment boundary loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.part import Loss, LossConfig

LEAST = 1e-6  # clip of the probability of the next byte


class CAB(Loss):
    """Mean of (1 - P(x_{t+1} | x_<=t) - p_t)^2, with no gradient through P (arXiv 2601.22805).

    Boundaries are drawn to positions whose next byte is hard to predict. The last position of a
    document counts as 0. The paper has no public code.
    """

    reads_next_byte = True

    @dataclass(frozen=True)
    class Config(LossConfig):
        """Confidence-alignment boundary loss (SOMBRERO)."""

        weight: float = 0.01
        """weight of the loss relative to cross-entropy"""

    def __call__(self, x):
        ids_BL = x.boundaries.segment_ids_BL
        known_BL = jnp.exp(-jax.lax.stop_gradient(x.next_byte_nll_BL[:, 1:]))
        known_BL = jnp.pad(jnp.clip(known_BL, LEAST, 1 - LEAST), ((0, 0), (0, 1)))
        has_next_BL = jnp.pad(ids_BL[:, 1:] == ids_BL[:, :-1], ((0, 0), (0, 1)))
        error_BL = jnp.square(1 - known_BL - x.boundaries.boundary_prob_BL)
        return x.mean(jnp.where(has_next_BL, error_BL, 0.0))
