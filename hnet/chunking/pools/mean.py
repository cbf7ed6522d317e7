"""The pool of dynamic token pooling: the mean over a chunk, read at the end of the chunk."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.ema import ema
from hnet.chunking.part import Pool, PoolConfig
from hnet.nn.layers import segment_positions, segment_starts


def chunk_ids(boundary_mask_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Number of each position's chunk, from 1, if boundaries END chunks; int32.

    The last chunk of a segment may be incomplete; it is then never read.
    """
    after_BL = jnp.pad(boundary_mask_BL[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(after_BL | segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)


def running_mean(x_BLD: jax.Array, chunk_ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over the chunk so far (B, L, D), its number of positions so far (B, L)), float32.

    mean_t = x_t / n_t + (1 - 1 / n_t) mean_{t-1}: an EMA whose gate is 1 at a chunk's first
    position. A stream keeps mean and n; at the end of a chunk, the mean is its vector.
    """
    count_BL = (segment_positions(chunk_ids_BL) + 1).astype(jnp.float32)
    return ema(x_BLD.astype(jnp.float32), 1 / count_BL, chunk_ids_BL), count_BL


@jax.custom_vjp
def mean_pool(
    x_BLD: jax.Array,
    boundary_ste_BL: jax.Array,
    boundary_mask_BL: jax.Array,
    segment_ids_BL: jax.Array,
) -> jax.Array:
    """Mean over the chunk up to each position, float32; valid as a chunk vector at boundaries only.

    boundary_ste_BL: b as float32. It does not change the output, but receives the gradient of
    dynamic token pooling (arXiv 2211.09761), which treats the chunk index of a position as
    continuous. Let c be the mean of a complete chunk of n positions, a the gradient of c, m the
    number of its positions up to and including k, and r_k the mean of these m positions:

        dL/db_k = (1/n) a . (sum_{t > k} x_t - (n - m) c) = (m/n) a . (c - r_k).

    It is zero at the last position of a chunk, and in an unfinished chunk.
    """
    del boundary_ste_BL
    return running_mean(x_BLD, chunk_ids(boundary_mask_BL, segment_ids_BL))[0]


def _mean_pool_fwd(x_BLD, boundary_ste_BL, boundary_mask_BL, segment_ids_BL):
    ids_BL = chunk_ids(boundary_mask_BL, segment_ids_BL)
    mean_BLD, count_BL = running_mean(x_BLD, ids_BL)
    return mean_BLD, (mean_BLD, count_BL, ids_BL, boundary_mask_BL)


def _mean_pool_bwd(saved, grad_BLD):
    mean_BLD, count_BL, ids_BL, boundary_mask_BL = saved
    length = ids_BL.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)[None, :]
    boundary_at_BL = jnp.where(boundary_mask_BL, index_L, length)
    next_BL = jax.lax.cummin(boundary_at_BL, axis=1, reverse=True)

    def at_end(values_BL):  # value at the last position of each position's chunk
        return jax.vmap(lambda v, i: v.at[i].get(mode="clip"))(values_BL, next_BL)

    complete_BL = (next_BL < length) & (at_end(ids_BL) == ids_BL)
    n_BL = at_end(count_BL)
    per_position_BLD = at_end(grad_BLD) / n_BL[..., None]
    grad_x_BLD = jnp.where(complete_BL[..., None], per_position_BLD, 0.0)
    inner_BL = jnp.sum(grad_x_BLD * (at_end(mean_BLD) - mean_BLD), axis=-1)
    return grad_x_BLD, count_BL * inner_BL, None, None


mean_pool.defvjp(_mean_pool_fwd, _mean_pool_bwd)


class Mean(Pool):
    """The mean over the chunk that ends at the boundary (arXiv 2211.09761, section 2)."""

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Mean over the chunk (DTP, MAGNET, FlexiTokens)."""

    def init(self, rows, d_model):
        return jnp.zeros((rows, d_model), jnp.float32), jnp.zeros((rows,), jnp.float32)

    def step(self, state, x):
        mean_RD, count_R = state
        count_R = count_R + 1
        share_R1 = (1 / count_R)[:, None]
        mean_RD = share_R1 * x.h_RD + (1 - share_R1) * mean_RD
        return (mean_RD, count_R), mean_RD

    def __call__(self, rows, boundaries, slots):
        ids_BL = rows.context.segment_ids_BL
        return slots.gather(
            mean_pool(rows.h_BLD, boundaries.boundary_ste_BL, boundaries.boundary_mask_BL, ids_BL)
        )

    def after(self, rows, boundaries):
        closed_BL = boundaries.boundary_mask_BL
        ids_BL = chunk_ids(closed_BL, rows.context.segment_ids_BL)
        mean_BLD, count_BL = running_mean(rows.h_BLD, ids_BL)
        mean_BLD = jnp.where(closed_BL[..., None], 0.0, mean_BLD)
        return rows.at_end(mean_BLD), rows.at_end(jnp.where(closed_BL, 0.0, count_BL))
