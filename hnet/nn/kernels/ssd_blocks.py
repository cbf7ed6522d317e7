"""The SSD of Mamba-2 as block matmuls with a derivative by hand: array code for all platforms, made
for CPUs.

The plain form is `hnet.nn.ssd.ssd_reference`. Axes here: H heads, P channels per head, N state
size, T positions per block, K blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.nn.kernels.derivatives import transposed
from hnet.nn.ssd import SegmentMarks, matmul_in, segment_marks


def ssd_blocks(
    x_BLHP: jax.Array,
    dt_BLH: jax.Array,
    A_H: jax.Array,
    B_BLN: jax.Array,
    C_BLN: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    block_len: int,
) -> jax.Array:
    """`ssd_reference` as matmuls over blocks of T positions (arXiv 2405.21060, section 6).

    Within a block y = (L o C B' o dt') x with L[i, j] = exp(sum_{j < r <= i} dt_r A); a state of
    size H x N x P is carried between blocks. Equal neighbours in `segment_ids_BL` are one segment;
    every decay across a segment boundary is exactly zero. Decays are float32; matmul operands have
    the dtype of `x_BLHP`. Returns y_BLHP in float32.
    """
    length = x_BLHP.shape[1]
    T = min(block_len, length)
    K = -(-length // T)

    def blocks(a):  # (B, L, ...) -> (B, K, T, ...); the padding (dt = 0) changes no state
        a = jnp.pad(a, ((0, 0), (0, K * T - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(a.shape[0], K, T, *a.shape[2:])

    x, dt, B, C, segment_ids = map(blocks, (x_BLHP, dt_BLH, B_BLN, C_BLN, segment_ids_BL))
    dt_BKHT = dt.swapaxes(2, 3)
    log_a_BKHT = dt_BKHT * A_H[None, None, :, None]
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    y_BKTHP = _by_blocks(x, dt_BKHT, log_a_BKHT, B, C, segment_marks(segment_ids))
    return y_BKTHP.reshape(x.shape[0], K * T, *x.shape[3:])[:, :length]


class _Decays(NamedTuple):
    """Decay factors of positions and states, 0 across a segment boundary."""

    within_BKHTT: jax.Array
    """decay from j to i, at [i, j] or at [j, i]"""
    to_end_BKTH1: jax.Array
    from_start_BKTH1: jax.Array
    carry_BKH: jax.Array


def _decays(log_a_BKHT: jax.Array, marks: SegmentMarks, *, to_first: bool) -> _Decays:
    """Decays of each block; to_first: `within` is [i, j] with i >= j, otherwise [j, i].

    Sums are matmuls: XLA's CPU backend recomputes a cumulative sum for each use of an entry.

    The rounding error of a difference of two long sums is a relative error of its exponential. So
    each logarithm is split into a multiple of 2^-8, whose sums are exact, and a remainder, whose
    sums are small.
    """
    coarse_BKHT = jnp.round(log_a_BKHT * 256) / 256
    sums_XBKHT = _sum(jnp.stack([coarse_BKHT, log_a_BKHT - coarse_BKHT]), jnp.triu)
    total_BKHT = sums_XBKHT[0] + sums_XBKHT[1]  # sum of log_a over positions <= t
    later_BKHT = _sum(log_a_BKHT, lambda a: jnp.tril(a, -1))
    coarse_BKHTT, rest_BKHTT = (
        a[..., :, None] - a[..., None, :] if to_first else a[..., None, :] - a[..., :, None]
        for a in sums_XBKHT
    )
    T = log_a_BKHT.shape[-1]
    causal_TT = np.where(np.tri(T, dtype=bool) if to_first else np.tri(T, dtype=bool).T, 0, -np.inf)
    mask_BKTT = marks.log_same_BKTT + jnp.asarray(causal_TT, jnp.float32)[None, None]
    from_start_BKHT = jnp.exp(total_BKHT)
    return _Decays(
        jnp.exp(coarse_BKHTT + rest_BKHTT + mask_BKTT[:, :, None]),
        _by_position(jnp.where(marks.to_end_BKT[:, :, None], jnp.exp(later_BKHT), 0.0)),
        _by_position(jnp.where(marks.reaches_BKT[:, :, None], from_start_BKHT, 0.0)),
        jnp.where(marks.stays_BK[..., None], from_start_BKHT[..., -1], 0.0),
    )


def _by_position(a_BKHT: jax.Array) -> jax.Array:
    return a_BKHT.swapaxes(2, 3)[..., None]


def _sum(a_XT: jax.Array, triangle: Callable) -> jax.Array:
    """[..., i]: sum over r of a[..., r] * triangle(ones)[r, i]."""
    T = a_XT.shape[-1]
    ones_TT = triangle(jnp.ones((T, T), a_XT.dtype))
    return jnp.matmul(a_XT, ones_TT, precision=jax.lax.Precision.HIGHEST)


def _swapped(a_BKTX: jax.Array, dtype) -> jax.Array:
    """a_BKXT in `dtype`, in memory, so that XLA does not take the transpose into a matmul."""
    a_BKTX = a_BKTX.astype(dtype)
    if dtype == jnp.bfloat16:
        return transposed(a_BKTX, 2, 3)
    return jax.lax.optimization_barrier(a_BKTX.swapaxes(2, 3))


@jax.custom_vjp
def _by_blocks(x_BKTHP, dt_BKHT, log_a_BKHT, B_BKTN, C_BKTN, marks: SegmentMarks) -> jax.Array:
    """`ssd_blocks` on blocks; y_BKTHP float32.

    Within a block there is one matmul per head; between blocks one for all heads, which share B and
    C. No product contracts the rows of its left operand, which is slow in XLA's CPU backend:
    operands are transposed first, where they are smallest.
    """
    return _by_blocks_fwd(x_BKTHP, dt_BKHT, log_a_BKHT, B_BKTN, C_BKTN, marks)[0]


def _by_blocks_fwd(x, dt_BKHT, log_a_BKHT, B, C, marks):
    einsum = partial(matmul_in, dtype=x.dtype)
    decays = _decays(log_a_BKHT, marks, to_first=True)
    scores_BKTT = einsum("bkin,bkjn->bkij", C, B)
    weights_BKHTT = decays.within_BKHTT * scores_BKTT[:, :, None] * dt_BKHT[..., None, :]
    y = einsum("bkhij,bkhjp->bkhip", weights_BKHTT, _swapped(x, x.dtype)).swapaxes(2, 3)
    entering = None
    if x.shape[1] > 1:
        x_end = x.astype(jnp.float32) * (_by_position(dt_BKHT) * decays.to_end_BKTH1)
        added_BKND = einsum("bknt,bktd->bknd", _swapped(B, x.dtype), _flat(x_end))
        entering = _carried(added_BKND, decays.carry_BKH)
        y += decays.from_start_BKTH1 * einsum("bktn,bknd->bktd", C, entering).reshape(x.shape)
    return y, (x, dt_BKHT, log_a_BKHT, B, C, marks, entering)


def _flat(a_BKTHP: jax.Array) -> jax.Array:
    """Merge heads and their channels into one axis D."""
    return a_BKTHP.reshape(*a_BKTHP.shape[:3], -1)


def _carried(added_BKND, carry_BKH, *, reverse: bool = False):
    """State that enters each block: the decayed state that entered the block before, plus the
    contribution of that block.

    A loop over the second axis: a scan needs the blocks first, which costs two copies. The states
    have their own array: if they overwrote `added`, XLA's CPU backend would copy all of it in each
    iteration.
    """
    B, K, N, D = added_BKND.shape
    H = carry_BKH.shape[-1]

    def pass_on(i, loop):
        states_BKND, state_BNHP = loop
        k = K - 1 - i if reverse else i
        state_B1ND = state_BNHP.reshape(B, 1, N, D)
        states_BKND = jax.lax.dynamic_update_slice_in_dim(states_BKND, state_B1ND, k, 1)
        added_BNHP = jax.lax.dynamic_index_in_dim(added_BKND, k, 1, False).reshape(B, N, H, -1)
        carry_BH = jax.lax.dynamic_index_in_dim(carry_BKH, k, 1, False)
        return states_BKND, carry_BH[:, None, :, None] * state_BNHP + added_BNHP

    zero = jnp.zeros((B, N, H, D // H), added_BKND.dtype)
    return jax.lax.fori_loop(0, K, pass_on, (jnp.zeros_like(added_BKND), zero))[0]


def _by_blocks_bwd(saved, dy):
    """The derivative recomputes the decays, so that no (T, T) array per head is saved.

    The gradient of log a_r sums over all pairs i > j with j < r <= i, computed as the sum over
    i >= r minus the sum over j >= r. Pairs i = j, which have no decay, are left out, so that no
    large terms cancel.
    """
    x, dt_BKHT, log_a_BKHT, B, C, marks, entering = saved
    T, dtype = x.shape[2], x.dtype
    einsum = partial(matmul_in, dtype=dtype)
    decays = _decays(log_a_BKHT, marks, to_first=False)
    scores_BKTT = einsum("bkjn,bkin->bkji", B, C)
    dt_BKHT1 = dt_BKHT[..., None]
    weights_BKHTT = decays.within_BKHTT * scores_BKTT[:, :, None] * dt_BKHT1
    dy_BKHTP = _swapped(dy, dtype)
    dx = einsum("bkhji,bkhip->bkhjp", weights_BKHTT, dy_BKHTP).swapaxes(2, 3)
    # from here on: gradient of the weight of j at i, without the factor dt_j
    dweights_BKHTT = einsum("bkhjp,bkhip->bkhji", _swapped(x, dtype), dy_BKHTP)
    same_BKHT = jnp.diagonal(dweights_BKHTT, axis1=-2, axis2=-1)
    dweights_BKHTT = dweights_BKHTT * decays.within_BKHTT
    dscores_BKTT = jnp.sum(dweights_BKHTT * dt_BKHT1, axis=2)
    dB = einsum("bkji,bkin->bkjn", dscores_BKTT, C)
    dC = einsum("bkij,bkjn->bkin", _swapped(dscores_BKTT, dtype), B)
    later_TT = jnp.asarray(np.tri(T, k=-1).T, jnp.float32)
    pairs_BKHTT = dweights_BKHTT * (scores_BKTT * later_TT[None, None])[:, :, None]
    pairs_BKHT = jnp.sum(pairs_BKHTT, axis=-1)
    ddt_BKHT = pairs_BKHT + same_BKHT * jnp.sum(B * C, axis=-1)[:, :, None]
    dtotal_BKHT = jnp.einsum(
        "bkhj,bkhji->bkhi", dt_BKHT, pairs_BKHTT, precision=jax.lax.Precision.HIGHEST
    )
    dtotal_BKHT -= dt_BKHT * pairs_BKHT
    dlog_a = jnp.zeros_like(log_a_BKHT)
    if x.shape[1] > 1:
        x, dt_BKTH1 = x.astype(jnp.float32), _by_position(dt_BKHT)

        def over_channels(a_BKTHP, b_BKTHP):  # (B, K, H, T)
            return jnp.sum(a_BKTHP * b_BKTHP, axis=-1).swapaxes(2, 3)

        dy_start = dy * decays.from_start_BKTH1
        dC += einsum("bktd,bknd->bktn", _flat(dy_start), entering)
        read = einsum("bktn,bknd->bktd", C, entering).reshape(x.shape)
        dtotal_BKHT += over_channels(dy_start, read)
        dentering = einsum("bknt,bktd->bknd", _swapped(C, dtype), _flat(dy_start))
        dadded = _carried(dentering, decays.carry_BKH, reverse=True)
        by_head_BKNHP = (dadded * entering).reshape(*dadded.shape[:3], -1, x.shape[-1])
        dcarry_BKH = jnp.sum(by_head_BKNHP, axis=(2, 4)) * decays.carry_BKH
        x_end = x * (dt_BKTH1 * decays.to_end_BKTH1)
        dB += einsum("bktd,bknd->bktn", _flat(x_end), dadded)
        dx_end = einsum("bktn,bknd->bktd", B, dadded).reshape(x.shape)
        dx += dx_end * (dt_BKTH1 * decays.to_end_BKTH1)
        dlater_BKHT = over_channels(dx_end, x) * decays.to_end_BKTH1[..., 0].swapaxes(2, 3)
        ddt_BKHT += dlater_BKHT
        dlog_a = _sum(dlater_BKHT * dt_BKHT, lambda a: jnp.triu(a, 1)) + dcarry_BKH[..., None]
    same_BKTT = jnp.exp(marks.log_same_BKTT) * jnp.asarray(np.tri(T), jnp.float32)[None, None]
    dlog_a += jnp.einsum(  # sums within each segment only, so rounding does not cross segments
        "bkhi,bkir->bkhr", dtotal_BKHT, same_BKTT, precision=jax.lax.Precision.HIGHEST
    )
    return dx.astype(saved[0].dtype), ddt_BKHT, dlog_a, dB, dC, None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)
