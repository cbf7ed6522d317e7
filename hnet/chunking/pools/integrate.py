"""Integrate and fire: a chunk is a sum of states whose weights add up to 1."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids, running_mean


class Weights(NamedTuple):
    """Weights that a predictor accumulates, (B, L) or (R,) float32."""

    weight: jax.Array
    before: jax.Array
    """sum of the weights of the chunk before this position, below 1"""


class Integrate(Pool):
    """The weighted sum over a chunk; where its weights reach 1, the rest opens the next chunk.

    (arXiv 1905.11235; modelscope/FunASR.) If the capacity clips a boundary, weights of both chunks
    are added up.
    """

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Sum over the chunk with weights that add up to 1 (CIF)."""

        def problem_in(self, chunking):
            if chunking.predictor.part.gives_extra != "weights":
                return (
                    f"pool='integrate' with predictor={chunking.predictor.name!r}, which has no "
                    "weights: use predictor='cif', or pool='mean'"
                )
            return None

    def init(self, rows, d_model):
        zeros_RD = jnp.zeros((rows, d_model), jnp.float32)
        return zeros_RD, zeros_RD

    def step(self, state, x):
        weight_R1, rest_R1 = x.extra.weight[:, None], 1 - x.extra.before[:, None]
        sum_RD = state[0]
        opens_RD = (weight_R1 - rest_R1) * x.h_RD
        return (sum_RD + weight_R1 * x.h_RD, opens_RD), sum_RD + rest_R1 * x.h_RD

    def restart(self, state, rows, d_model):
        return state[1], state[1]

    def __call__(self, rows, boundaries, slots):
        return slots.gather(self._sums(rows, boundaries)[0])

    def after(self, rows, boundaries):
        sum_BLD, opens_BLD = self._sums(rows, boundaries)
        closed_BL1 = boundaries.boundary_mask_BL[..., None]
        return rows.at_end(jnp.where(closed_BL1, opens_BLD, sum_BLD)), rows.at_end(opens_BLD)

    def _sums(self, rows, boundaries):
        """(sum over the chunk so far, what opens the next chunk if this position ends one)."""
        mask_BL, h_BLD = boundaries.boundary_mask_BL, rows.h_BLD
        ids_BL = rows.context.segment_ids_BL
        weight_BL, rest_BL = boundaries.extra.weight, 1 - boundaries.extra.before
        opens_BLD = (weight_BL - rest_BL)[..., None] * h_BLD
        same_BL = jnp.pad(ids_BL[:, 1:] == ids_BL[:, :-1], ((0, 0), (1, 0)))
        carried_BL = jnp.pad(mask_BL[:, :-1], ((0, 0), (1, 0))) & same_BL
        before_BLD = jnp.pad(opens_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        own_BL1 = jnp.where(mask_BL, rest_BL, weight_BL)[..., None]
        added_BLD = own_BL1 * h_BLD + jnp.where(carried_BL[..., None], before_BLD, 0.0)
        mean_BLD, count_BL = running_mean(added_BLD, chunk_ids(mask_BL, ids_BL))
        return mean_BLD * count_BL[..., None], opens_BLD
