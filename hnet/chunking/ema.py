"""Exponential moving averages over slots or positions, as blocked matmuls."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hnet.nn.layers import segment_starts

EMA_BLOCK = 32


def ema_reference(y_BMD: jax.Array, gate_BM: jax.Array, segment_ids_BM: jax.Array) -> jax.Array:
    """z_m = P_m y_m + (1 - P_m) z_{m-1}, one slot at a time; z = 0 before each segment."""

    def one_row(y_MD, gate_M, start_M):
        def step(z_D, inputs):
            y_D, gate, start = inputs
            z_D = gate * y_D + (1 - gate) * jnp.where(start, 0.0, z_D)
            return z_D, z_D

        return jax.lax.scan(step, jnp.zeros_like(y_MD[0]), (y_MD, gate_M, start_M))[1]

    return jax.vmap(one_row)(y_BMD, gate_BM, segment_starts(segment_ids_BM))


@jax.custom_vjp
def ema(y_BMD: jax.Array, gate_BM: jax.Array, segment_ids_BM: jax.Array) -> jax.Array:
    """`ema_reference` as matmuls over blocks of slots (arXiv 2507.07955, eq. 5).

    float32 in and out.
    """
    return _smoothed(gate_BM, segment_ids_BM)(gate_BM[..., None] * y_BMD)


def _smoothed(gate_BM: jax.Array, segment_ids_BM: jax.Array) -> Callable[[jax.Array], jax.Array]:
    starts_BM = segment_starts(segment_ids_BM)
    return partial(_decaying_sums, log_keep_BM=jnp.log1p(-gate_BM), start_BM=starts_BM)


def _ema_bwd(saved, dz_BMD):
    """Gradients of z_m = P_m y_m + (1 - P_m) z_{m-1}, with s_m = dz_m + (1 - P_{m+1}) s_{m+1}.

    dy_m = P_m s_m, dP_m = s_m . (y_m - z_{m-1}).
    """
    y_BMD, gate_BM, segment_ids_BM, z_BMD = saved
    (s_BMD,) = jax.linear_transpose(_smoothed(gate_BM, segment_ids_BM), y_BMD)(dz_BMD)
    starts_BM1 = segment_starts(segment_ids_BM)[..., None]
    before_BMD = jnp.where(starts_BM1, 0.0, jnp.pad(z_BMD[:, :-1], ((0, 0), (1, 0), (0, 0))))
    dgate_BM = _over_channels(s_BMD * (y_BMD - before_BMD))
    return gate_BM[..., None] * s_BMD, dgate_BM, None


def _ema_fwd(*inputs):
    z_BMD = ema(*inputs)
    return z_BMD, (*inputs, z_BMD)


ema.defvjp(_ema_fwd, _ema_bwd)


def _decaying_sums(x_BMD: jax.Array, log_keep_BM: jax.Array, start_BM: jax.Array) -> jax.Array:
    """z_m = x_m + a_m z_{m-1} with a = exp(log_keep), 0 where a segment starts.

    Within a block z = W x + (prod a) z_before with W[i, j] = prod_{j < r <= i} a_r. The last z of
    the blocks are again decaying sums, computed recursively: the depth is log(M) matmuls. Each
    product is the exponential of a sum over only its own log factors, so there is no cancellation.
    """
    length = x_BMD.shape[1]
    T = min(EMA_BLOCK, length)
    K = -(-length // T)

    def blocks(a):
        a = jnp.pad(a, ((0, 0), (0, K * T - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(a.shape[0], K, T, *a.shape[2:])

    x_BKTD, log_keep_BKT, start_BKT = blocks(x_BMD), blocks(log_keep_BM), blocks(start_BM)
    later_TT = jnp.tril(jnp.ones((T, T), bool), -1)  # [r, j]: factor r acts on slot j < r
    log_BKTT = jnp.where(later_TT[None, None], log_keep_BKT[..., None], 0.0)
    starts_BKT = jnp.cumsum(start_BKT, axis=-1, dtype=jnp.int32)
    same_BKTT = starts_BKT[..., :, None] == starts_BKT[..., None, :]
    visible_BKTT = same_BKTT & jnp.tril(jnp.ones((T, T), bool))[None, None]
    weight_BKTT = jnp.where(visible_BKTT, jnp.exp(jnp.cumsum(log_BKTT, axis=-2)), 0.0)
    z_BKTD = jnp.einsum("bkij,bkjd->bkid", weight_BKTT, x_BKTD, precision=jax.lax.Precision.HIGHEST)
    if K > 1:
        log_from_start_BKT = jnp.cumsum(log_keep_BKT, axis=-1)
        from_start_BKT = jnp.where(starts_BKT == 0, jnp.exp(log_from_start_BKT), 0.0)
        last_BKD = _decaying_sums(
            z_BKTD[:, :, -1], log_from_start_BKT[..., -1], starts_BKT[..., -1] > 0
        )
        before_BKD = jnp.pad(last_BKD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        z_BKTD += from_start_BKT[..., None] * before_BKD[:, :, None]
    return z_BKTD.reshape(x_BMD.shape[0], K * T, -1)[:, :length]


def _over_channels(a_BLD: jax.Array) -> jax.Array:
    """Sum over D, with B and L merged: XLA's CPU backend is slow at this sum if B is 1."""
    return jnp.sum(a_BLD.reshape(-1, a_BLD.shape[-1]), axis=-1).reshape(a_BLD.shape[:-1])


def decaying_count(keep_BL: jax.Array) -> jax.Array:
    """n_t = 1 + keep_t n_{t-1}, float32 (B, L); keep is 0 where a segment starts."""

    def both(a, b):
        return a[0] * b[0], b[1] + b[0] * a[1]

    return jax.lax.associative_scan(both, (keep_BL, jnp.ones_like(keep_BL)), axis=1)[1]
