"""The SSD of Mamba-2 (arXiv 2405.21060, section 6) as Pallas kernels for NVIDIA GPUs (Triton).

One program of the forward kernel is one head of one row: it goes over the blocks and keeps the
state in registers. The gradient takes two kernels: one goes over the blocks in reverse and stores
the gradient of each block's state; in the other a program is one block of one row and goes over the
heads, which share B and C. HBM holds only inputs, outputs and the states between blocks. Not yet
run on a GPU.

Axes here: H heads, P channels per head, N state size, T positions per block, K blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from hnet.nn.kernels.ssd_matmul import position_sums
from hnet.nn.layers import segment_starts

BLOCK_LEN = 64
SMALLEST = 16  # least size of an axis of a matrix product; sizes are powers of 2
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def ssd_triton(
    x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN, segment_ids_BL, skip_H=None, *, block_len=BLOCK_LEN,
    interpret=False,
) -> jax.Array:  # fmt: skip
    """`ssd_blocks` with log_a = dt A <= 0; y_BLHP in the dtype of x, sums in float32.

    skip_H: factors of the skip connection, skip x, that is added to y. States between blocks are
    rounded to the dtype of x. interpret: run as ordinary JAX, on any device.
    """
    rows, length, H, P = x_BLHP.shape
    N, T = B_BLN.shape[-1], _power_of_2(block_len)
    padding = -length % T
    more_P, more_N = _power_of_2(P) - P, _power_of_2(N) - N

    def padded(a, channels=0):
        widths = ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 3) + ((0, channels),)
        return jnp.pad(a, widths if a.ndim > 2 else widths[:2])

    x_BLD = padded(x_BLHP, more_P).reshape(rows, length + padding, H * (P + more_P))
    B_BLN, C_BLN = (padded(a.astype(x_BLD.dtype), more_N) for a in (B_BLN, C_BLN))
    dt_BHL, log_a_BHL = (padded(a).swapaxes(1, 2) for a in (dt_BLH, log_a_BLH))
    starts_BL = segment_starts(padded(segment_ids_BL))
    run_BL = jnp.cumsum(starts_BL, axis=1, dtype=jnp.int32)
    skip_H = jnp.zeros((H,), jnp.float32) if skip_H is None else skip_H
    y_BLD = _ssd(T, interpret, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, skip_H, run_BL)
    return y_BLD.reshape(rows, length + padding, H, -1)[:, :length, :, :P]


def _power_of_2(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


class _Factors(NamedTuple):
    """Decays of each head, float32 and 0 across a segment boundary; blocks of T positions."""

    total_BHL: jax.Array
    """sum of log_a from the block's start to each position"""
    from_start_BHL: jax.Array
    """decay from the block's start to each position"""
    to_end_BHL: jax.Array
    """decay from each position to the block's end"""
    through_BHK: jax.Array
    """decay through each block"""


def _factors(log_a_BHL: jax.Array, run_BL: jax.Array, T: int) -> _Factors:
    log_a_BHKT = log_a_BHL.reshape(*log_a_BHL.shape[:2], -1, T)
    total_BHKT = position_sums(log_a_BHKT, np.triu(np.ones((T, T))))
    later_BHKT = position_sums(log_a_BHKT, np.tril(np.ones((T, T)), -1))
    run_BKT = run_BL.reshape(len(run_BL), -1, T)
    last_BK = run_BKT[:, :, -1]
    before_BK = jnp.pad(last_BK[:, :-1], ((0, 0), (1, 0)))  # runs are numbered from 1
    reaches_BKT, to_end_BKT = run_BKT == before_BK[..., None], run_BKT == last_BK[..., None]
    from_start_BHKT = jnp.where(reaches_BKT[:, None], jnp.exp(total_BHKT), 0.0)
    to_end_BHKT = jnp.where(to_end_BKT[:, None], jnp.exp(later_BHKT), 0.0)
    stays_BK = last_BK == before_BK
    through_BHK = jnp.where(stays_BK[:, None], jnp.exp(total_BHKT[..., -1]), 0.0)
    flat = (a.reshape(log_a_BHL.shape) for a in (total_BHKT, from_start_BHKT, to_end_BHKT))
    return _Factors(*flat, through_BHK)


class _Call(NamedTuple):
    """Sizes of the arrays, and how a kernel is started."""

    T: int
    interpret: bool
    rows: int
    length: int
    H: int
    N: int
    P: int

    def run(
        self, kernel: Callable, name: str, grid: str, inputs: dict[str, Any], outputs: dict,
        warps: int,
    ) -> list[jax.Array]:  # fmt: skip
        """Call `kernel` with references to arrays; a program has one index of each axis in `grid`.

        grid: "BH" or "BK". inputs, outputs: array, or dtype of the result, by name and axes
        ("x BLD"). The references lack the axes of the grid; of L in "BK" they have one block, of D
        in "BH" one head.
        """
        T, K = self.T, self.length // self.T
        sizes = {"B": self.rows, "H": self.H, "K": K, "L": self.length, "D": self.H * self.P}
        sizes |= {"N": self.N, "P": self.P}
        parts = {"BH": {"D": self.P}, "BK": {"L": T}}[grid]  # split, but not removed

        def spec(named: str) -> pl.BlockSpec:
            axes = named.split()[1]
            block = tuple(None if a in grid else parts.get(a, sizes[a]) for a in axes)
            split = {"B": 0, grid[1]: 1} | dict.fromkeys(parts, 1)

            def index(*program):
                return tuple(program[split[a]] if a in split else 0 for a in axes)

            return pl.BlockSpec(block, index)

        shapes = [
            jax.ShapeDtypeStruct(tuple(sizes[a] for a in named.split()[1]), dtype)
            for named, dtype in outputs.items()
        ]
        return pl.pallas_call(
            partial(kernel, T=T),
            grid=tuple(sizes[axis] for axis in grid),
            in_specs=[spec(named) for named in inputs],
            out_specs=[spec(named) for named in outputs],
            out_shape=shapes,
            interpret=self.interpret,
            name=name,
            **({} if self.interpret else {"compiler_params": _triton(warps)}),
        )(*inputs.values())


def _triton(warps: int) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=warps, num_stages=2)


def _call(T: int, interpret: bool, x_BLD, dt_BHL, B_BLN) -> _Call:
    H = dt_BHL.shape[1]
    return _Call(T, interpret, *x_BLD.shape[:2], H, B_BLN.shape[-1], x_BLD.shape[2] // H)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ssd(T, interpret, *inputs) -> jax.Array:
    return _forward(T, interpret, *inputs, keep=False)[0]


def _ssd_fwd(T, interpret, *inputs):
    y_BLD, entering_BKHNP = _forward(T, interpret, *inputs, keep=True)
    return y_BLD, (inputs, entering_BKHNP)


def _forward(T, interpret, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, skip_H, run_BL, *, keep):
    d, dtype = _factors(log_a_BHL, run_BL, T), x_BLD.dtype
    inputs = {
        "x BLD": x_BLD, "dt BHL": dt_BHL, "total BHL": d.total_BHL, "start BHL": d.from_start_BHL,
        "end BHL": dt_BHL * d.to_end_BHL, "through BHK": d.through_BHK, "B BLN": B_BLN,
        "C BLN": C_BLN, "skip H": skip_H, "run BL": run_BL,
    }  # fmt: skip
    outputs = {"y BLD": dtype} | ({"entering BKHNP": dtype} if keep else {})
    call = _call(T, interpret, x_BLD, dt_BHL, B_BLN)
    return call.run(_forward_kernel, "ssd_forward", "BH", inputs, outputs, warps=4)


def _dot(a, b, dims, dtype):
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32
    )


def _block(k, T):
    return pl.ds(pl.multiple_of(k * T, T), T)


def _visible(run_T):
    T = len(run_T)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    return (i >= j) & (run_T[:, None] == run_T[None])


def _decay(total_T):
    """exp(sum_{j < r <= i} log_a_r); any finite number above the diagonal."""
    return jnp.exp(jnp.minimum(total_T[:, None] - total_T[None], 0.0))


def _forward_kernel(x, dt, total, start, end, through, B, C, skip, run, y, *entering, T):
    """y = (scores o decay o dt') x + start C h + skip x,  h <- through h + B' (end x)."""
    dtype = x.dtype

    def block(k, h_NP):
        at = _block(k, T)
        x_TP, B_TN, C_TN = x[at, :], B[at, :], C[at, :]
        scores_TT = jnp.where(_visible(run[at]), _dot(C_TN, B_TN, NT, dtype), 0.0)
        mixed_TT = scores_TT * _decay(total[at]) * dt[at][None]
        carried_TP = start[at][:, None] * _dot(C_TN, h_NP, NN, dtype)
        x32_TP = x_TP.astype(jnp.float32)
        y_TP = _dot(mixed_TT, x_TP, NN, dtype) + carried_TP + skip[...] * x32_TP
        y[at, :] = y_TP.astype(dtype)
        if entering:
            entering[0][k] = h_NP.astype(dtype)
        x_end_TP = x32_TP * end[at][:, None]
        return through[k] * h_NP + _dot(B_TN, x_end_TP, TN, dtype)

    zero_NP = jnp.zeros((B.shape[1], x.shape[1]), jnp.float32)
    jax.lax.fori_loop(0, x.shape[0] // T, block, zero_NP)


def _state_gradient_kernel(dy, start, through, C, leaving, *, T):
    """Gradient of the state that leaves each block; blocks in reverse order."""
    K, dtype = dy.shape[0] // T, dy.dtype

    def block(i, dh_NP):
        k = K - 1 - i
        at = _block(k, T)
        leaving[k] = dh_NP.astype(dtype)
        dy_start_TP = dy[at, :].astype(jnp.float32) * start[at][:, None]
        return through[k] * dh_NP + _dot(C[at, :], dy_start_TP, TN, dtype)

    jax.lax.fori_loop(0, K, block, jnp.zeros((C.shape[1], dy.shape[1]), jnp.float32))


def _gradient_kernel(
    x, dy, dt, total, start, to_end, B, C, skip, run, entering, leaving,
    dx, rows, pairs, same, later, past, dB, dC, *, T,
):  # fmt: skip
    """Gradients of one block: of x, B and C, and sums from which those of dt and log_a follow.

    rows: sum over earlier j of the pair (i, j), and what the state adds. pairs: sum over later i,
    without dt_j. same: dy_i x_i. later, past: gradients through the decay to the end and through
    the block.
    """
    H, P, dtype, f32 = dt.shape[0], entering.shape[2], x.dtype, jnp.float32
    B_TN, C_TN = B[...], C[...]
    visible_TT = _visible(run[...])
    scores_TT = jnp.where(visible_TT, _dot(C_TN, B_TN, NT, dtype), 0.0)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    zero_TN = jnp.zeros(B_TN.shape, f32)

    def head(h, sums):
        dscores_TT, dB_TN, dC_TN = sums
        channels = pl.ds(pl.multiple_of(h * P, P), P)
        x_TP, dy_TP, dt_T = x[:, channels], dy[:, channels], dt[h]
        x32_TP, dy32_TP = x_TP.astype(f32), dy_TP.astype(f32)
        decay_TT = _decay(total[h])
        dx_TP = _dot(scores_TT * decay_TT * dt_T[None], dy_TP, TN, dtype)
        decayed_TT = _dot(dy_TP, x_TP, NT, dtype) * decay_TT
        dscores_TT += decayed_TT * dt_T[None]
        pairs_TT = jnp.where(i > j, decayed_TT * scores_TT, 0.0)
        pairs[h] = jnp.sum(pairs_TT, axis=0)
        same[h] = jnp.sum(x32_TP * dy32_TP, axis=1)

        h_NP, dh_NP = entering[h], leaving[h]
        dy_start_TP = dy32_TP * start[h][:, None]
        read_T = jnp.sum(_dot(C_TN, h_NP, NN, dtype) * dy_start_TP, axis=1)
        rows[h] = jnp.sum(pairs_TT * dt_T[None], axis=1) + read_T
        end_T = (dt_T * to_end[h])[:, None]
        dx_end_TP = _dot(B_TN, dh_NP, NN, dtype)
        dx[:, channels] = (dx_TP + dx_end_TP * end_T + skip[h] * dy32_TP).astype(dtype)
        later[h] = jnp.sum(dx_end_TP * x32_TP, axis=1) * to_end[h]
        past[h] = jnp.sum(h_NP.astype(f32) * dh_NP.astype(f32))
        dC_TN += _dot(dy_start_TP, h_NP, NT, dtype)
        dB_TN += _dot(x32_TP * end_T, dh_NP, NT, dtype)
        return dscores_TT, dB_TN, dC_TN

    sums = jax.lax.fori_loop(0, H, head, (jnp.zeros((T, T), f32), zero_TN, zero_TN))
    dscores_TT = jnp.where(visible_TT, sums[0], 0.0)
    dB[...] = sums[1] + _dot(dscores_TT, C_TN, TN, dtype)
    dC[...] = sums[2] + _dot(dscores_TT, B_TN, NN, dtype)


def _ssd_bwd(T, interpret, saved, dy_BLD):
    (x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, skip_H, run_BL), entering_BKHNP = saved
    d, f32 = _factors(log_a_BHL, run_BL, T), jnp.float32
    call = _call(T, interpret, x_BLD, dt_BHL, B_BLN)
    inputs = {
        "dy BLD": dy_BLD, "start BHL": d.from_start_BHL, "through BHK": d.through_BHK,
        "C BLN": C_BLN,
    }  # fmt: skip
    outputs = {"leaving BKHNP": x_BLD.dtype}
    (leaving_BKHNP,) = call.run(
        _state_gradient_kernel, "ssd_state_gradient", "BH", inputs, outputs, warps=4
    )
    inputs = {
        "x BLD": x_BLD, "dy BLD": dy_BLD, "dt BHL": dt_BHL, "total BHL": d.total_BHL,
        "start BHL": d.from_start_BHL, "to_end BHL": d.to_end_BHL, "B BLN": B_BLN, "C BLN": C_BLN,
        "skip H": skip_H, "run BL": run_BL, "entering BKHNP": entering_BKHNP,
        "leaving BKHNP": leaving_BKHNP,
    }  # fmt: skip
    outputs = {"dx BLD": x_BLD.dtype, **dict.fromkeys(("rows BHL", "pairs BHL"), f32)}
    outputs |= dict.fromkeys(("same BHL", "later BHL", "past BKH", "dB BLN", "dC BLN"), f32)
    dx, rows, pairs, same, later, past_BKH, dB, dC = call.run(
        _gradient_kernel, "ssd_gradient", "BK", inputs, outputs, warps=8
    )
    BC_BL = jnp.sum(B_BLN.astype(f32) * C_BLN.astype(f32), axis=-1)
    ddt_BHL = pairs + same * BC_BL[:, None] + later

    def blocks(a_BHL):
        return a_BHL.reshape(*a_BHL.shape[:2], -1, T)

    run_BKT = run_BL.reshape(len(run_BL), -1, T)
    same_BKTT = (run_BKT[..., :, None] == run_BKT[..., None, :]) & np.tri(T, dtype=bool)[None, None]
    dlog_a_BHKT = jnp.einsum(
        "bhki,bkir->bhkr", blocks(rows - dt_BHL * pairs), same_BKTT.astype(f32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    dlog_a_BHKT += position_sums(blocks(later * dt_BHL), np.triu(np.ones((T, T)), 1))
    dlog_a_BHKT += (past_BKH.swapaxes(1, 2) * d.through_BHK)[..., None]
    dlog_a_BHL = dlog_a_BHKT.reshape(log_a_BHL.shape)
    dB_BLN, dC_BLN = dB.astype(B_BLN.dtype), dC.astype(C_BLN.dtype)
    return dx, ddt_BHL, dlog_a_BHL, dB_BLN, dC_BLN, jnp.sum(same, axis=(0, 2)), None


# optimize_remat: a forward pass that will be recomputed does not write the states
_ssd.defvjp(_ssd_fwd, _ssd_bwd, optimize_remat=True)
