"""Pools of the chunk before a boundary, for boundaries that are seen one position late.

A predictor that compares t - 1 with t tells at t that a chunk ended at t - 1. With alignment start
the main network then runs at t on the chunk that ended; the document's first position is a chunk
of its own.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from hnet.chunking.ema import decaying_count, ema
from hnet.chunking.part import Pool, PoolConfig, where_rows
from hnet.chunking.pools.mean import running_mean
from hnet.nn.layers import segment_starts


def of_previous(rows, values_BLD):
    """Values of the position before each one, and the state itself where a document starts."""
    starts_BL1 = segment_starts(rows.context.segment_ids_BL)[..., None]
    before_BLD = jnp.pad(values_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.where(starts_BL1, rows.h_BLD, before_BLD)


class LastBefore(Pool):
    """The last state of the chunk that ended before the boundary (allenai/bolmo-core)."""

    alignments = ("start",)

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Encoder state before the boundary (Bolmo, one byte late)."""

    def init(self, rows, d_model):
        return jnp.zeros((rows, d_model), jnp.float32), jnp.zeros((rows,), bool)

    def step(self, state, x):
        last_RD, began_R = state
        return (x.h_RD, jnp.ones_like(began_R)), where_rows(began_R, last_RD, x.h_RD)

    def restart(self, state, rows, d_model):
        return state

    def __call__(self, rows, boundaries, slots):
        return slots.gather(of_previous(rows, rows.h_BLD))

    def after(self, rows, boundaries):
        return rows.at_end(rows.h_BLD), rows.lengths_B > 0


class MeanBefore(Pool):
    """The mean over the chunk that ended before the boundary (arXiv 2512.24617)."""

    alignments = ("start",)

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Mean over the chunk before the boundary (DLCM)."""

    def init(self, rows, d_model):
        zeros_RD = jnp.zeros((rows, d_model), jnp.float32)
        return zeros_RD, jnp.zeros((rows,), jnp.float32), zeros_RD

    def step(self, state, x):
        mean_RD, count_R, _ = state
        chunk_RD = where_rows(count_R > 0, mean_RD, x.h_RD)
        share_R1 = (1 / (count_R + 1))[:, None]
        mean_RD = share_R1 * x.h_RD + (1 - share_R1) * mean_RD
        return (mean_RD, count_R + 1, x.h_RD), chunk_RD

    def restart(self, state, rows, d_model):
        last_RD = state[2]  # at the boundary, the first position of the new chunk
        return last_RD, jnp.ones_like(state[1]), last_RD

    def __call__(self, rows, boundaries, slots):
        return slots.gather(of_previous(rows, self._means(rows, boundaries)[0]))

    def after(self, rows, boundaries):
        mean_BLD, count_BL = self._means(rows, boundaries)
        return rows.at_end(mean_BLD), rows.at_end(count_BL), rows.at_end(rows.h_BLD)

    def _means(self, rows, boundaries):
        opens_BL = boundaries.boundary_mask_BL | segment_starts(rows.context.segment_ids_BL)
        return running_mean(rows.h_BLD, jnp.cumsum(opens_BL, axis=1, dtype=jnp.int32))


class Existence(Pool):
    """A mean over the positions before the boundary, each weighted by its share in the chunk.

    Position j is still in the chunk of t with probability e_j = prod (1 - p_i) over j < i <= t,
    as positions of a segment exist in Zonkey (arXiv 2601.21768). So p gets a gradient without a
    straight-through estimator. Zonkey's windows begin at a boundary and overlap; a causal model
    cannot read them at the boundary, so weights here run backwards from it.
    """

    alignments = ("start",)

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Mean before the boundary, weighted by the probability to be in its chunk (Zonkey)."""

    def init(self, rows, d_model):
        return jnp.zeros((rows, d_model), jnp.float32), jnp.zeros((rows,), jnp.float32)

    def step(self, state, x):
        mean_RD, weight_R = state
        chunk_RD = where_rows(weight_R > 0, mean_RD, x.h_RD)
        weight_R = 1 + (1 - x.prob_R) * weight_R
        share_R1 = (1 / weight_R)[:, None]
        return (share_R1 * x.h_RD + (1 - share_R1) * mean_RD, weight_R), chunk_RD

    def restart(self, state, rows, d_model):
        return state

    def __call__(self, rows, boundaries, slots):
        return slots.gather(of_previous(rows, self._means(rows, boundaries)[0]))

    def after(self, rows, boundaries):
        mean_BLD, weight_BL = self._means(rows, boundaries)
        return rows.at_end(mean_BLD), rows.at_end(weight_BL)

    def _means(self, rows, boundaries):
        ids_BL = rows.context.segment_ids_BL
        keep_BL = jnp.where(segment_starts(ids_BL), 0.0, 1 - boundaries.boundary_prob_BL)
        weight_BL = decaying_count(keep_BL)
        return ema(rows.h_BLD, 1 / weight_BL, ids_BL), weight_BL
