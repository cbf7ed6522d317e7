"""The SSD for GPUs as a few large matmuls: no loop, large arrays in the dtype of the input.

Axes here: H heads, P channels per head, N state size, T positions per block, K blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.nn.layers import segment_starts

BLOCK_LEN = 128
MAX_BLOCKS = 512  # blocks per row; one matrix has an entry per pair of blocks


def ssd_matmul(
    x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN, segment_ids_BL, *, block_len=BLOCK_LEN
) -> jax.Array:
    """`ssd_blocks` with log_a = dt A <= 0; y_BLHP in the dtype of x, sums in float32.

    One matmul over all blocks of a row sums the states between blocks, instead of a loop (arXiv
    2405.21060, section 6.2, step 3). These states are rounded to the dtype of x.
    """
    length = x_BLHP.shape[1]
    T = min(max(block_len, -(-length // MAX_BLOCKS)), length)
    K = -(-length // T)

    def blocks(a):  # (B, L, ...) -> (B, K, T, ...); the padding (dt = 0) changes no state
        a = jnp.pad(a, ((0, 0), (0, K * T - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(a.shape[0], K, T, *a.shape[2:])

    x, dt, log_a, B, C, ids = map(blocks, (x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN, segment_ids_BL))
    run_BKT = blocks(jnp.cumsum(segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32))
    y_BKTHP = _by_blocks(
        x, dt.swapaxes(2, 3), log_a.swapaxes(2, 3), B.astype(x.dtype), C.astype(x.dtype), run_BKT
    )
    return y_BKTHP.reshape(x.shape[0], K * T, *x.shape[3:])[:, :length]


class _Decays(NamedTuple):
    """Decay factors of positions and states, 0 across a segment boundary; float32."""

    within_BKHTT: jax.Array
    """[i, j]: decay from j to i; any finite number if i does not see j"""
    visible_BKTT: jax.Array
    """[i, j]: 1 if i sees j, else 0"""
    to_end_BKHT: jax.Array
    from_start_BKHT: jax.Array
    between_BHKK: jax.Array
    """[k, j]: decay from the end of block j to the start of block k"""
    whole_BKH: jax.Array


def _decays(log_a_BKHT, run_BKT, *, is_exact: bool) -> _Decays:
    T, K = run_BKT.shape[2], run_BKT.shape[1]
    terms = [log_a_BKHT]
    if is_exact:
        # Split into a multiple of 2^-8, whose sums are exact, and a small remainder: a difference
        # between two long sums has their rounding error, a relative error of its exponential.
        coarse_BKHT = jnp.round(log_a_BKHT * 256) / 256
        terms = [coarse_BKHT, log_a_BKHT - coarse_BKHT]
    sums = [position_sums(term, np.triu(np.ones((T, T)))) for term in terms]
    total_BKHT = sum(sums)
    later_BKHT = position_sums(log_a_BKHT, np.tril(np.ones((T, T)), -1))
    last_BK = run_BKT[:, :, -1]
    before_BK = jnp.pad(last_BK[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    same_BKTT = run_BKT[..., :, None] == run_BKT[..., None, :]
    visible_BKTT = same_BKTT & jnp.asarray(np.tri(T, dtype=bool))[None, None]
    within = jnp.exp(jnp.minimum(sum(a[..., :, None] - a[..., None, :] for a in sums), 0.0))
    to_end = jnp.where((run_BKT == last_BK[..., None])[:, :, None], jnp.exp(later_BKHT), 0.0)
    from_start = jnp.where((run_BKT == before_BK[..., None])[:, :, None], jnp.exp(total_BKHT), 0.0)
    whole_BHK = total_BKHT[..., -1].swapaxes(1, 2)
    through_BHK = position_sums(whole_BHK, np.triu(np.ones((K, K)), 1))  # over m < k
    log_between = through_BHK[..., :, None] - (through_BHK + whole_BHK)[..., None, :]
    goes_BKK = (before_BK[:, :, None] == last_BK[:, None, :]) & jnp.asarray(
        np.tri(K, k=-1, dtype=bool)
    )[None]
    between = jnp.exp(jnp.where(goes_BKK[:, None], log_between, -jnp.inf))
    whole = jnp.where((last_BK == before_BK)[..., None], jnp.exp(total_BKHT[..., -1]), 0.0)
    return _Decays(within, visible_BKTT.astype(jnp.float32), to_end, from_start, between, whole)


def position_sums(a_XT, ones_TT) -> jax.Array:
    """[..., i]: sum over r of a[..., r] * ones[r, i], in full float32."""
    ones_TT = jnp.asarray(ones_TT, a_XT.dtype)
    return jnp.matmul(a_XT, ones_TT, precision=jax.lax.Precision.HIGHEST)


def _dot(spec, a, b, dtype):
    """einsum with operands and result in `dtype`; sums are float32, rounded once."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=dtype)


@jax.custom_vjp
def _by_blocks(x_BKTHP, dt_BKHT, log_a_BKHT, B_BKTN, C_BKTN, run_BKT) -> jax.Array:
    return _by_blocks_fwd(x_BKTHP, dt_BKHT, log_a_BKHT, B_BKTN, C_BKTN, run_BKT)[0]


def _positions_first(a_BKHT):
    return a_BKHT.swapaxes(2, 3)[..., None]


def _by_blocks_fwd(x, dt, log_a, B, C, run):
    dot, f32 = partial(_dot, dtype=x.dtype), jnp.float32
    d = _decays(log_a, run, is_exact=x.dtype == jnp.float32)
    scores = jnp.einsum("bkin,bkjn->bkij", C, B, preferred_element_type=f32) * d.visible_BKTT
    weights = (d.within_BKHTT * scores[:, :, None] * dt[..., None, :]).astype(x.dtype)
    y = dot("bkhij,bkjhp->bkihp", weights, x).astype(f32)
    x_end = x.astype(f32) * _positions_first(dt * d.to_end_BKHT)
    added = dot("bktn,bkthp->bknhp", B, x_end)
    entering = dot("bhkj,bjnhp->bknhp", d.between_BHKK, added)
    y += _positions_first(d.from_start_BKHT) * dot("bktn,bknhp->bkthp", C, entering).astype(f32)
    return jax.lax.optimization_barrier(y.astype(x.dtype)), (x, dt, log_a, B, C, run, entering)


def _by_blocks_bwd(saved, dy):
    x, dt, log_a, B, C, run, entering = saved
    dy = jax.lax.optimization_barrier(dy)
    dot, f32, T = partial(_dot, dtype=x.dtype), jnp.float32, x.shape[2]
    d = _decays(log_a, run, is_exact=x.dtype == jnp.float32)
    scores = jnp.einsum("bkin,bkjn->bkij", C, B, preferred_element_type=f32) * d.visible_BKTT
    weights = (d.within_BKHTT * scores[:, :, None] * dt[..., None, :]).astype(x.dtype)
    dx = dot("bkhij,bkihp->bkjhp", weights, dy).astype(f32)
    # gradient of the weight of j at i, without the factor dt_j
    dweights = dot("bkihp,bkjhp->bkhij", dy, x)
    same = jnp.diagonal(dweights, axis1=-2, axis2=-1).astype(f32)
    decayed = dweights.astype(f32) * d.within_BKHTT
    dscores = jnp.sum(decayed * dt[..., None, :], axis=2) * d.visible_BKTT
    later_TT = jnp.asarray(np.tri(T, k=-1), f32)
    pairs = decayed * (scores * later_TT[None, None])[:, :, None]
    pairs_to = jnp.sum(pairs, axis=-2)
    dtotal = jnp.sum(pairs * dt[..., None, :], axis=-1) - dt * pairs_to
    ddt = pairs_to + same * jnp.sum(B.astype(f32) * C.astype(f32), axis=-1)[:, :, None]

    from_start, to_end = _positions_first(d.from_start_BKHT), _positions_first(d.to_end_BKHT)
    dt_last = _positions_first(dt)
    dy_start = (dy.astype(f32) * from_start).astype(x.dtype)
    x_end = (x.astype(f32) * (dt_last * to_end)).astype(x.dtype)
    dentering = dot("bktn,bkthp->bknhp", C, dy_start)
    dadded = dot("bhkj,bknhp->bjnhp", d.between_BHKK, dentering)
    dC = dot("bkij,bkjn->bkin", dscores, B).astype(f32) + dot(
        "bkthp,bknhp->bktn", dy_start, entering
    ).astype(f32)
    dB = dot("bkij,bkin->bkjn", dscores, C).astype(f32) + dot(
        "bkthp,bknhp->bktn", x_end, dadded
    ).astype(f32)

    def over_channels(a, b):  # (B, K, H, T)
        return jnp.sum(a.astype(f32) * b.astype(f32), axis=-1).swapaxes(2, 3)

    read = dot("bktn,bknhp->bkthp", C, entering)
    dtotal += over_channels(dy_start, read)
    dx_end = dot("bktn,bknhp->bkthp", B, dadded)
    dx += dx_end.astype(f32) * (dt_last * to_end)
    dlater = over_channels(dx_end, x) * d.to_end_BKHT
    ddt += dlater
    dcarry = jnp.sum((dadded.astype(f32) * entering.astype(f32)), axis=(2, 4)) * d.whole_BKH
    dlog_a = position_sums(dlater * dt, np.triu(np.ones((T, T)), 1)) + dcarry[..., None]
    same_BKTT = (run[..., :, None] == run[..., None, :]) & jnp.asarray(np.tri(T, dtype=bool))[
        None, None
    ]
    dlog_a += jnp.einsum(
        "bkhi,bkir->bkhr", dtotal, same_BKTT.astype(f32), precision=jax.lax.Precision.HIGHEST
    )
    return dx.astype(x.dtype), ddt, dlog_a, dB.astype(B.dtype), dC.astype(C.dtype), None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)
