"""The mean over a chunk, read where the chunk ends."""

import jax
import jax.numpy as jnp

from hnet.chunking.dechunk import ema
from hnet.nn.layers import segment_positions, segment_starts


def chunk_ids(boundary_mask_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Number of the chunk each position lies in, from 1, where boundaries END chunks; int32.

    A chunk ends with its segment too, but then it is not complete and nobody reads it.
    """
    after_BL = jnp.pad(boundary_mask_BL[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(after_BL | segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)


def running_mean(x_BLD: jax.Array, chunk_ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over the chunk so far (B, L, D), its number of positions so far (B, L)), float32.

    mean_t = x_t / n_t + (1 - 1 / n_t) mean_{t-1}: an EMA whose gate is 1 at a chunk's first
    position. A stream keeps mean and n; when the chunk closes, the mean is its pooled state.
    """
    count_BL = (segment_positions(chunk_ids_BL) + 1).astype(jnp.float32)
    return ema(x_BLD.astype(jnp.float32), 1 / count_BL, chunk_ids_BL), count_BL


@jax.custom_vjp
def mean_pool(
    x_BLD: jax.Array,
    boundary_BL: jax.Array,
    boundary_mask_BL: jax.Array,
    segment_ids_BL: jax.Array,
) -> jax.Array:
    """Mean over the chunk up to each position, float32; to be read at boundaries alone.

    boundary_BL is b as a number: it changes no value, but receives the gradient of dynamic token
    pooling (arXiv 2211.09761), which treats the index of a position's chunk as continuous. For k in
    a complete chunk of n positions with mean c, read with gradient a, of which m are at or before k
    and have the mean r_k:

        dL/db_k = (1/n) a . (sum_{t > k} x_t - (n - m) c) = (m/n) a . (c - r_k),

    so nothing for the position that closes a chunk, and nothing in an unfinished chunk.
    """
    del boundary_BL
    return running_mean(x_BLD, chunk_ids(boundary_mask_BL, segment_ids_BL))[0]


def _mean_pool_fwd(x_BLD, boundary_BL, boundary_mask_BL, segment_ids_BL):
    ids_BL = chunk_ids(boundary_mask_BL, segment_ids_BL)
    mean_BLD, count_BL = running_mean(x_BLD, ids_BL)
    return mean_BLD, (mean_BLD, count_BL, ids_BL, boundary_mask_BL)


def _mean_pool_bwd(saved, grad_BLD):
    mean_BLD, count_BL, ids_BL, boundary_mask_BL = saved
    length = ids_BL.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)[None, :]
    boundary_at_BL = jnp.where(boundary_mask_BL, index_L, length)
    next_BL = jax.lax.cummin(boundary_at_BL, axis=1, reverse=True)

    def at_end(values_BL):  # the value where the position's chunk ends
        return jax.vmap(lambda v, i: v.at[i].get(mode="clip"))(values_BL, next_BL)

    complete_BL = (next_BL < length) & (at_end(ids_BL) == ids_BL)
    n_BL = at_end(count_BL)
    per_position_BLD = at_end(grad_BLD) / n_BL[..., None]
    grad_x_BLD = jnp.where(complete_BL[..., None], per_position_BLD, 0.0)
    inner_BL = jnp.sum(grad_x_BLD * (at_end(mean_BLD) - mean_BLD), axis=-1)
    return grad_x_BLD, count_BL * inner_BL, None, None


mean_pool.defvjp(_mean_pool_fwd, _mean_pool_bwd)
