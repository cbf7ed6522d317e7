"""The SSD of Mamba-2 (arXiv 2405.21060, section 6) as a Pallas TPU kernel, and its gradient.

One grid step is one block of T positions and one group of G heads. Scores, decays and the state
carried from block to block stay in on-chip memory; HBM holds only the inputs, the output and, for
the gradient, the state that enters each block. Axes in addition to those of mamba2.py: G heads per
group, W = G x P channels per group, R rows of `marks`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hnet.nn.layers import segment_starts

LANES = 128  # lanes per TPU vector register; block lengths are multiples of it
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
RUN, REACHES, TO_END, STAYS = range(4)  # rows of marks
NUM_MARKS = 8  # rows per register; only the first four are used


def ssd_pallas(
    x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN, segment_ids_BL, *, block_len=LANES, interpret=False
) -> jax.Array:
    """`ssd_blocks` with log_a = dt A <= 0 and the same arithmetic; y_BLHP in float32.

    block_len: a multiple of 128 on a TPU. interpret: run as ordinary JAX, on any device.
    """
    B, length, H, P = x_BLHP.shape
    T = block_len
    padding = -length % T

    def padded(a):
        return jnp.pad(a, ((0, 0), (0, padding)) + ((0, 0),) * (a.ndim - 2))

    x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN = map(padded, (x_BLHP, dt_BLH, log_a_BLH, B_BLN, C_BLN))
    x_BLD = x_BLHP.reshape(B, length + padding, H * P)
    dt_BHL, log_a_BHL = dt_BLH.swapaxes(1, 2), log_a_BLH.swapaxes(1, 2)
    marks_BRL = _marks(padded(segment_ids_BL), T)
    sizes = _Sizes(T, H, P, B_BLN.shape[-1], interpret)
    y_BLD = _blocks(sizes, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, marks_BRL)
    return y_BLD.reshape(x_BLHP.shape)[:, :length]


def _marks(segment_ids_BL: jax.Array, T: int) -> jax.Array:
    """Marks of each position, float32 (B, R, L); all but RUN are 0 or 1.

    RUN: number of its segment. REACHES: the segment began in an earlier block. TO_END: the segment
    contains the block's last position. STAYS: one segment contains the block's last position and
    the last position of the block before.
    """
    run_BL = jnp.cumsum(segment_starts(segment_ids_BL), axis=1, dtype=jnp.int32)
    run_BKT = run_BL.reshape(run_BL.shape[0], -1, T)
    last_BK1 = run_BKT[:, :, -1:]
    before_BK1 = jnp.pad(last_BK1[:, :-1], ((0, 0), (1, 0), (0, 0)))
    stays_BKT = jnp.broadcast_to(last_BK1 == before_BK1, run_BKT.shape)
    rows = (run_BKT, run_BKT == before_BK1, run_BKT == last_BK1, stays_BKT)
    rows = jnp.stack([r.reshape(run_BL.shape).astype(jnp.float32) for r in rows], axis=1)
    return jnp.pad(rows, ((0, 0), (0, NUM_MARKS - len(rows[0])), (0, 0)))


@dataclass(frozen=True)
class _Sizes:
    T: int
    H: int
    P: int
    N: int
    interpret: bool

    @property
    def groups(self) -> int:
        """Number of groups: groups of 8 heads if these fill registers, else one group."""
        return self.H // 8 if self.H % 8 == 0 and 8 * self.P % LANES == 0 else 1

    @property
    def state(self) -> tuple[int, int, int]:
        return self.groups, self.N, self.H // self.groups * self.P

    def call(self, kernel, batch, length, inputs, outputs, scratch, *, backward, name):
        """pallas_call over (rows, blocks, groups); blocks in reverse order if `backward`."""
        T, H, P, N, groups = self.T, self.H, self.P, self.N, self.groups
        K = length // T
        G, W = H // groups, H // groups * P

        def at(k):
            return K - 1 - k if backward else k

        kinds = {  # kind of array -> (block shape, index map from grid step (b, k, g))
            "BLD": ((1, T, W), lambda b, k, g: (b, at(k), g)),
            "BHL": ((1, G, T), lambda b, k, g: (b, g, at(k))),
            "BLN": ((1, T, N), lambda b, k, g: (b, at(k), 0)),
            "BRL": ((1, NUM_MARKS, T), lambda b, k, g: (b, 0, at(k))),
            "BKND": ((1, 1, N, W), lambda b, k, g: (b, at(k), 0, g)),
        }
        shapes = {"BLD": (length, H * P), "BHL": (H, length), "BLN": (length, N)}
        shapes["BKND"] = (K, N, H * P)
        return pl.pallas_call(
            partial(kernel, sizes=self),
            grid=(batch, K, groups),
            in_specs=[pl.BlockSpec(*kinds[kind]) for kind in inputs],
            out_specs=[pl.BlockSpec(*kinds[kind]) for kind, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct((batch, *shapes[k]), d) for k, d in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary")
            ),
            interpret=self.interpret,
            name=name,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(sizes, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, marks_BRL):
    return _forward(sizes, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, marks_BRL, keep=False)[0]


def _blocks_fwd(sizes, *inputs):
    y_BLD, entering_BKND = _forward(sizes, *inputs, keep=True)
    return y_BLD, (inputs, entering_BKND)


def _blocks_bwd(sizes, saved, grad_y_BLD):
    (x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, marks_BRL), entering_BKND = saved
    T, f32 = sizes.T, jnp.float32
    batch, length, _ = x_BLD.shape
    run = sizes.call(
        _backward_kernel, batch, length,
        ("BLD", "BHL", "BHL", "BLN", "BLN", "BRL", "BKND", "BLD"),
        (("BLD", x_BLD.dtype), ("BHL", f32), ("BHL", f32), ("BLN", f32), ("BLN", f32)),
        (sizes.state, (T, T), (T, T)), backward=True, name="ssd_backward",
    )  # fmt: skip
    total_BHL = _block_cumsum(log_a_BHL, T)
    x, dt, log_a, B, C = run(
        x_BLD, dt_BHL, total_BHL, B_BLN, C_BLN, marks_BRL, entering_BKND, grad_y_BLD
    )
    return x, dt, log_a, B.astype(B_BLN.dtype), C.astype(C_BLN.dtype), None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _forward(sizes, x_BLD, dt_BHL, log_a_BHL, B_BLN, C_BLN, marks_BRL, *, keep):
    batch, length, _ = x_BLD.shape
    run = sizes.call(
        _forward_kernel, batch, length,
        ("BLD", "BHL", "BHL", "BLN", "BLN", "BRL"),
        (("BLD", jnp.float32), *([("BKND", x_BLD.dtype)] if keep else [])),
        (sizes.state, (sizes.T, sizes.T)), backward=False, name="ssd_forward",
    )  # fmt: skip
    return run(x_BLD, dt_BHL, _block_cumsum(log_a_BHL, sizes.T), B_BLN, C_BLN, marks_BRL)


def _block_cumsum(a_BHL, T):
    return jnp.cumsum(a_BHL.reshape(*a_BHL.shape[:2], -1, T), axis=-1).reshape(a_BHL.shape)


def _visible(marks_RT, marks_TR):
    """Mask (T, T): j <= i, and j in the segment of i."""
    T = marks_RT.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    return (i >= j) & (marks_TR[:, RUN : RUN + 1] == marks_RT[RUN : RUN + 1])


def _decay(total_GT, total_TG, h):
    """exp(sum_{j < r <= i} log_a_r); any finite value above the diagonal."""
    return jnp.exp(jnp.minimum(total_TG[:, h : h + 1] - total_GT[h : h + 1], 0.0))


def _factors(total_GT, total_TG, marks_RT, marks_TR, h):
    """Decays of head h: from the block's start to each position, from each position to the
    block's end, and through the block."""
    from_start_T1 = jnp.exp(total_TG[:, h : h + 1]) * marks_TR[:, REACHES : REACHES + 1]
    whole_11 = total_GT[h : h + 1, -1:]
    to_end_T1 = jnp.exp(whole_11 - total_TG[:, h : h + 1]) * marks_TR[:, TO_END : TO_END + 1]
    return from_start_T1, to_end_T1, jnp.exp(whole_11) * marks_RT[STAYS : STAYS + 1, -1:]


def _dot(a, b, dims, dtype):
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), dims, preferred_element_type=jnp.float32
    )


def _forward_kernel(x, dt, total, B, C, marks, y, *rest, sizes):
    """y = (scores o decay) u + from_start C h,  h <- through h + B' (to_end u),  u = dt x."""
    P = sizes.P
    *entering, state, scores = rest
    k, g, dtype = pl.program_id(1), pl.program_id(2), x.dtype
    marks_RT, total_GT, dt_TG = marks[0], total[0], dt[0].T
    marks_TR, total_TG = marks_RT.T, total_GT.T

    @pl.when(k == 0)
    def _():
        state[g] = jnp.zeros(state.shape[1:], jnp.float32)

    @pl.when(g == 0)
    def _():
        visible_TT = _visible(marks_RT, marks_TR)
        scores[...] = jnp.where(visible_TT, _dot(C[0], B[0], NT, dtype), 0.0)

    h_NW = state[g]
    if entering:
        entering[0][0, 0] = h_NW.astype(dtype)
    carried_TW = _dot(C[0], h_NW, NN, dtype)
    for h in range(total_GT.shape[0]):
        cut = slice(h * P, (h + 1) * P)
        from_start, to_end, through = _factors(total_GT, total_TG, marks_RT, marks_TR, h)
        u_TP = x[0, :, cut].astype(jnp.float32) * dt_TG[:, h : h + 1]
        mixed_TP = _dot(scores[...] * _decay(total_GT, total_TG, h), u_TP, NN, dtype)
        y[0, :, cut] = mixed_TP + from_start * carried_TW[:, cut]
        state[g, :, cut] = through * h_NW[:, cut] + _dot(B[0], to_end * u_TP, TN, dtype)


def _backward_kernel(
    x, dt, total, B, C, marks, entering, grad_y,
    grad_x, grad_dt, grad_log_a, grad_B, grad_C, grad_state, scores, grad_scores, *, sizes,
):  # fmt: skip
    """Gradients of `_forward_kernel`; blocks in reverse order, `grad_state` is the carry.

    The factor exp(log_a_r) is in every path from j < r to i >= r. The gradient of log_a_r sums over
    only these pairs: a difference of larger sums would cancel for a head with fast decay.
    """
    T, P = sizes.T, sizes.P
    k, g, dtype = pl.program_id(1), pl.program_id(2), x.dtype
    marks_RT, total_GT, dt_TG = marks[0], total[0], dt[0].T
    marks_TR, total_TG = marks_RT.T, total_GT.T
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))

    @pl.when(k == 0)
    def _():
        grad_state[g] = jnp.zeros(grad_state.shape[1:], jnp.float32)

    @pl.when(g == 0)
    def _():
        visible_TT = _visible(marks_RT, marks_TR)
        scores[...] = jnp.where(visible_TT, _dot(C[0], B[0], NT, dtype), 0.0)
        grad_scores[...] = jnp.zeros((T, T), jnp.float32)
        grad_B[...] = jnp.zeros(grad_B.shape, jnp.float32)
        grad_C[...] = jnp.zeros(grad_C.shape, jnp.float32)

    h_NW, grad_h_NW = entering[0, 0], grad_state[g]
    carried_TW = _dot(C[0], h_NW, NN, dtype)
    grad_end_TW = _dot(B[0], grad_h_NW, NN, dtype)  # gradient of to_end u
    for h in range(total_GT.shape[0]):
        cut = slice(h * P, (h + 1) * P)
        from_start, to_end, through = _factors(total_GT, total_TG, marks_RT, marks_TR, h)
        x_TP, dy_TP = x[0, :, cut].astype(jnp.float32), grad_y[0, :, cut]
        u_TP = x_TP * dt_TG[:, h : h + 1]
        decay_TT = _decay(total_GT, total_TG, h)
        mix_TT = scores[...] * decay_TT
        grad_mix_TT = _dot(dy_TP, u_TP, NT, dtype)
        grad_scores[...] += decay_TT * grad_mix_TT

        grad_u_TP = _dot(mix_TT, dy_TP, TN, dtype) + to_end * grad_end_TW[:, cut]
        grad_x[0, :, cut] = (grad_u_TP * dt_TG[:, h : h + 1]).astype(grad_x.dtype)
        grad_dt_T1 = jnp.sum(grad_u_TP * x_TP, axis=1, keepdims=True)
        grad_dt[0, h : h + 1] = jnp.sum(jnp.where(i == j, grad_dt_T1, 0.0), axis=0, keepdims=True)

        into_T1 = from_start * jnp.sum(dy_TP * carried_TW[:, cut], axis=1, keepdims=True)
        out_T1 = to_end * jnp.sum(u_TP * grad_end_TW[:, cut], axis=1, keepdims=True)
        both = h_NW[:, cut].astype(jnp.float32) * grad_h_NW[:, cut]
        past_11 = through * jnp.sum(jnp.sum(both, axis=1, keepdims=True), axis=0, keepdims=True)
        crossing_TT = jnp.where(i >= j, _sums_before(mix_TT * grad_mix_TT, i < j) + into_T1, out_T1)
        grad_log_a[0, h : h + 1] = jnp.sum(crossing_TT, axis=0, keepdims=True) + past_11

        dy_start_TP = from_start * dy_TP
        grad_C[0] += _dot(dy_start_TP, h_NW[:, cut], NT, dtype)
        grad_B[0] += _dot(to_end * u_TP, grad_h_NW[:, cut], NT, dtype)
        grad_state[g, :, cut] = through * grad_h_NW[:, cut] + _dot(C[0], dy_start_TP, TN, dtype)

    @pl.when(g == pl.num_programs(2) - 1)
    def _():
        grad_TT = jnp.where(_visible(marks_RT, marks_TR), grad_scores[...], 0.0)
        grad_C[0] += _dot(grad_TT, B[0], NN, dtype)
        grad_B[0] += _dot(grad_TT, C[0], TN, dtype)


def _sums_before(a_TT, before_TT):
    """[i, r]: sum_{j < r} a[i, j] in float32, as matmuls of three bfloat16 parts with ones."""
    ones, total = before_TT.astype(jnp.bfloat16), jnp.zeros(a_TT.shape, jnp.float32)
    for _ in range(3):
        part = a_TT.astype(jnp.bfloat16)
        total += jax.lax.dot_general(part, ones, NN, preferred_element_type=jnp.float32)
        a_TT -= part.astype(jnp.float32)
    return total
