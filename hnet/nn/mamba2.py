"""Mamba-2 (arXiv 2405.21060): the SSD recurrence as block matmuls, and the mixer around it.

Axes here: H heads, P channels a head, N state size, T positions a block, K blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.cache import SSMCache, last_positions, read, write
from hnet.nn.kernels.spread import on_each_device
from hnet.nn.kernels.table import kernel
from hnet.nn.layers import RMSNorm, by_rows, fused_linear, linear, whole


def ssd_reference(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, segment_ids_BL) -> jax.Array:
    """The recurrence itself, one position at a time (arXiv 2405.21060, eq. 1 and 16):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t',  y_t = h_t C_t,  h reset at each segment start.
    Returns y_BLHP in float32. Slow: the oracle of `ssd`.
    """

    def one_row(x_LHP, dt_LH, B_LN, C_LN, segment_ids_L):
        def step(carry, inputs):
            state_HPN, previous = carry
            x_HP, dt_H, B_N, C_N, segment = inputs
            state_HPN = jnp.where(segment == previous, state_HPN, 0.0)
            decay_H11 = jnp.exp(dt_H * A_H)[:, None, None]
            update_HPN = (dt_H[:, None] * x_HP)[:, :, None] * B_N[None, None, :]
            state_HPN = decay_H11 * state_HPN + update_HPN
            return (state_HPN, segment), state_HPN @ C_N

        zero = jnp.zeros((*x_LHP.shape[1:], B_LN.shape[-1]), jnp.float32)
        inputs = (x_LHP, dt_LH, B_LN, C_LN, segment_ids_L)
        return jax.lax.scan(step, (zero, segment_ids_L[0]), inputs)[1]

    return jax.vmap(one_row)(x_BLHP, dt_BLH, B_BLN, C_BLN, segment_ids_BL)


class Marks(NamedTuple):
    """Which decays of a block of T positions cross no segment boundary."""

    visible_BKTT: jax.Array
    """[i, j]: j <= i in the same segment"""
    to_end_BKT: jax.Array
    """the segment is that of the block's last position"""
    reaches_BKT: jax.Array
    """the segment goes on from the block before"""
    stays_BK: jax.Array
    """the one before the block is also that of the block's last position"""


def ssd(
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

    Within a block y = (L o C B') (dt x) with L[i, j] = exp(sum_{j < r <= i} dt_r A); between
    blocks a state of H x N x P is carried. Equal neighbours in `segment_ids_BL` are one segment;
    every decay across a segment boundary is exactly zero. Decays are float32, matmul operands
    have the dtype of `x_BLHP`. Returns y_BLHP in float32.
    """
    length, dtype = x_BLHP.shape[1], x_BLHP.dtype
    T = min(block_len, length)
    K = -(-length // T)

    def blocks(a):  # (B, L, ...) -> (B, K, T, ...); the padding (dt = 0) changes no state
        a = jnp.pad(a, ((0, 0), (0, K * T - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(a.shape[0], K, T, *a.shape[2:])

    x, dt, B, C, segment_ids = map(blocks, (x_BLHP, dt_BLH, B_BLN, C_BLN, segment_ids_BL))
    dt_BKHT = dt.swapaxes(2, 3)
    x_dt = (x.swapaxes(2, 3).astype(jnp.float32) * dt_BKHT[..., None]).astype(dtype)
    log_a_BKHT = dt_BKHT * A_H[None, None, :, None]
    B, C = B.astype(jnp.float32), C.astype(jnp.float32)
    y_BKHTP = _by_blocks(x_dt, log_a_BKHT, B, C, _marks(segment_ids))
    return y_BKHTP.swapaxes(2, 3).reshape(x.shape[0], K * T, *x.shape[3:])[:, :length]


def _marks(segment_ids_BKT: jax.Array) -> Marks:
    T = segment_ids_BKT.shape[-1]
    same_BKTT = segment_ids_BKT[..., :, None] == segment_ids_BKT[..., None, :]
    last_BK = segment_ids_BKT[:, :, -1]
    before_BK = jnp.pad(last_BK[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return Marks(
        same_BKTT & jnp.tril(jnp.ones((T, T), bool))[None, None],
        segment_ids_BKT == last_BK[..., None],
        segment_ids_BKT == before_BK[..., None],
        last_BK == before_BK,
    )


class _Decays(NamedTuple):
    """Factors by which a position or a state shrinks, 0 across a segment boundary."""

    within_BKHTT: jax.Array
    to_end_BKHT: jax.Array
    from_start_BKHT: jax.Array
    carry_BKH: jax.Array


def _decays(log_a_BKHT: jax.Array, marks: Marks) -> _Decays:
    """Sums are matmuls: XLA on a CPU makes a cumulative sum again for each use of an entry."""
    total_BKHT = _sum(log_a_BKHT, jnp.triu)  # of factors up to and with this one
    later_BKHT = _sum(log_a_BKHT, lambda a: jnp.tril(a, -1))
    log_within = jnp.where(
        marks.visible_BKTT[:, :, None],
        total_BKHT[..., :, None] - total_BKHT[..., None, :],
        -jnp.inf,
    )
    from_start_BKHT = jnp.exp(total_BKHT)
    return _Decays(
        jnp.exp(log_within),
        jnp.where(marks.to_end_BKT[:, :, None], jnp.exp(later_BKHT), 0.0),
        jnp.where(marks.reaches_BKT[:, :, None], from_start_BKHT, 0.0),
        jnp.where(marks.stays_BK[..., None], from_start_BKHT[..., -1], 0.0),
    )


def _sum(a_XT: jax.Array, triangle: Callable) -> jax.Array:
    """At i the sum over the r with triangle(ones)[r, i]."""
    T = a_XT.shape[-1]
    ones_TT = triangle(jnp.ones((T, T), a_XT.dtype))
    return jnp.matmul(a_XT, ones_TT, precision=jax.lax.Precision.HIGHEST)


def _einsum(spec: str, *operands: jax.Array, dtype) -> jax.Array:
    cast = [a.astype(dtype) for a in operands]
    return jnp.einsum(spec, *cast, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _by_blocks(x_BKHTP, log_a_BKHT, B_BKTN, C_BKTN, marks: Marks) -> jax.Array:
    """`ssd` of x times dt, with one matmul a head and block for each product; y_BKHTP float32."""
    return _by_blocks_fwd(x_BKHTP, log_a_BKHT, B_BKTN, C_BKTN, marks)[0]


def _by_blocks_fwd(x, log_a_BKHT, B, C, marks):
    einsum = partial(_einsum, dtype=x.dtype)
    decays = _decays(log_a_BKHT, marks)
    scores_BKTT = einsum("bkin,bkjn->bkij", C, B)
    y = einsum("bkhij,bkhjp->bkhip", decays.within_BKHTT * scores_BKTT[:, :, None], x)
    entering = None
    if x.shape[1] > 1:
        B_end_BKHNT = B.swapaxes(2, 3)[:, :, None] * decays.to_end_BKHT[:, :, :, None]
        added_BKHNP = einsum("bkhnt,bkhtp->bkhnp", B_end_BKHNT, x)
        entering, _ = _carried(added_BKHNP, decays.carry_BKH)
        C_start_BKHTN = C[:, :, None] * decays.from_start_BKHT[..., None]
        y += einsum("bkhtn,bkhnp->bkhtp", C_start_BKHTN, entering)
    return y, (x, log_a_BKHT, B, C, marks, scores_BKTT, entering)


def _carried(added_BKHNP, carry_BKH, reverse=False):
    """State entering each block: that entering the block before, decayed, and what it added."""

    def pass_on(state_BHNP, inputs):
        added_BHNP, carry_BH = inputs
        return carry_BH[:, :, None, None] * state_BHNP + added_BHNP, state_BHNP

    by_block = (added_BKHNP.swapaxes(0, 1), carry_BKH.swapaxes(0, 1))
    zero = jnp.zeros_like(added_BKHNP[:, 0])
    last, entering_KBHNP = jax.lax.scan(pass_on, zero, by_block, reverse=reverse)
    return entering_KBHNP.swapaxes(0, 1), last


def _by_blocks_bwd(saved, dy):
    """The derivative with decays made again, so that no (T, T) array of a head is kept.

    The derivative by log a_r of sum_{j < r <= i} log a is summed over all pairs i > j, at i >= r
    less at j >= r. Without i = j, which depends on no decay, nothing large cancels in it.
    """
    x, log_a_BKHT, B, C, marks, scores_BKTT, entering = saved
    T, dtype = x.shape[3], x.dtype
    einsum = partial(_einsum, dtype=dtype)
    decays = _decays(log_a_BKHT, marks)
    weights_BKHTT = decays.within_BKHTT * scores_BKTT[:, :, None]
    dx = einsum("bkhij,bkhip->bkhjp", weights_BKHTT, dy)
    dweights_BKHTT = einsum("bkhip,bkhjp->bkhij", dy, x)
    dscores_BKTT = jnp.sum(dweights_BKHTT * decays.within_BKHTT, axis=2)
    dB = einsum("bkij,bkin->bkjn", dscores_BKTT, C)
    dC = einsum("bkij,bkjn->bkin", dscores_BKTT, B)
    before_TT = jnp.tril(jnp.ones((T, T), bool), -1)
    pairs_BKHTT = jnp.where(before_TT[None, None, None], dweights_BKHTT * weights_BKHTT, 0.0)
    dtotal_BKHT = jnp.sum(pairs_BKHTT, axis=-1) - jnp.sum(pairs_BKHTT, axis=-2)
    dlog_a = jnp.zeros_like(log_a_BKHT)
    if x.shape[1] > 1:
        dC_start = einsum("bkhtp,bkhnp->bkhtn", dy, entering)
        dC += jnp.sum(dC_start * decays.from_start_BKHT[..., None], axis=2)
        dtotal_BKHT += jnp.sum(dC_start * C[:, :, None], axis=-1) * decays.from_start_BKHT
        C_start_BKHNT = C.swapaxes(2, 3)[:, :, None] * decays.from_start_BKHT[:, :, :, None]
        dentering = einsum("bkhnt,bkhtp->bkhnp", C_start_BKHNT, dy)
        dadded, _ = _carried(dentering, decays.carry_BKH, reverse=True)
        dcarry_BKH = jnp.sum(dadded * entering, axis=(-2, -1)) * decays.carry_BKH
        B_end_BKHTN = B[:, :, None] * decays.to_end_BKHT[..., None]
        dx += einsum("bkhtn,bkhnp->bkhtp", B_end_BKHTN, dadded)
        dB_end = einsum("bkhtp,bkhnp->bkhtn", x, dadded)
        dB += jnp.sum(dB_end * decays.to_end_BKHT[..., None], axis=2)
        dlater_BKHT = jnp.sum(dB_end * B[:, :, None], axis=-1) * decays.to_end_BKHT
        dlog_a = _sum(dlater_BKHT, lambda a: jnp.triu(a, 1)) + dcarry_BKH[..., None]
    same_BKTT = marks.visible_BKTT.astype(jnp.float32)  # what cancels in a segment stays in it
    dlog_a += jnp.einsum(
        "bkhi,bkir->bkhr", dtotal_BKHT, same_BKTT, precision=jax.lax.Precision.HIGHEST
    )
    return dx.astype(dtype), dlog_a, dB, dC, None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)


def ssd_final_state(x_BLHP, dt_BLH, A_H, B_BLN) -> jax.Array:
    """h after the last position of rows of one segment: sum_t exp(sum_{r>t} dt_r A) dt_t x_t B_t'.

    A position with dt = 0 (padding) leaves the state alone. Returns (B, H, P, N) in float32.
    """
    log_a_BLH = dt_BLH * A_H[None, None, :]
    after_BLH = jnp.pad(log_a_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    to_end_BLH = jnp.exp(jax.lax.cumsum(after_BLH, axis=1, reverse=True))
    x_end = x_BLHP.astype(jnp.float32) * (dt_BLH * to_end_BLH)[..., None]
    return jnp.einsum("blhp,bln->bhpn", x_end, B_BLN.astype(jnp.float32))


def causal_conv(x_BLC, weight_WC, bias_C, segment_ids_BL) -> jax.Array:
    """Depthwise causal convolution that sees no other segment: tap W-1 is the position itself."""
    width = weight_WC.shape[0]
    out_BLC = x_BLC * weight_WC[None, None, -1] + bias_C[None, None, :]
    for back in range(1, min(width, x_BLC.shape[1])):
        shifted = jnp.pad(x_BLC[:, :-back], ((0, 0), (back, 0), (0, 0)))
        same_BL = segment_ids_BL[:, back:] == segment_ids_BL[:, :-back]
        same_BL = jnp.pad(same_BL, ((0, 0), (back, 0)))
        out_BLC += jnp.where(same_BL[..., None], shifted, 0) * weight_WC[None, None, -1 - back]
    return out_BLC


class Mamba2(nnx.Module):
    """The official Mamba-2 mixer, one group: in_proj -> conv -> SSD -> gated norm -> out_proj."""

    def __init__(self, config: HNetConfig, stage: StageConfig, *, out_std: float, rngs: nnx.Rngs):
        ssm, dtype, key = config.ssm, config.compute.dtype, rngs.params
        self.d_inner = ssm.expand * stage.d_model
        self.num_heads = self.d_inner // ssm.head_dim
        self.d_state, self.dtype = ssm.d_state, jnp.dtype(dtype)
        self.compute = config.compute
        H, C = self.num_heads, self.d_inner + 2 * ssm.d_state
        self.in_proj = linear(stage.d_model, self.d_inner + C + H, dtype=dtype, rngs=rngs)
        # torch's default for Conv1d, which the official initialisation leaves alone
        bound = ssm.d_conv**-0.5
        self.conv1d_weight = nnx.Param(
            jax.random.uniform(key(), (ssm.d_conv, C), jnp.float32, -bound, bound)
        )
        self.conv1d_bias = nnx.Param(jax.random.uniform(key(), (C,), jnp.float32, -bound, bound))
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1]; A is uniform in [1, 16]
        log_dt = jax.random.uniform(key(), (H,), jnp.float32, jnp.log(1e-3), jnp.log(1e-1))
        dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(key(), (H,), jnp.float32, 1.0, 16.0)))
        self.D = nnx.Param(jnp.ones((H,), jnp.float32))
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = linear(self.d_inner, stage.d_model, std=out_std, dtype=dtype, rngs=rngs)

    def split_inputs(self, x_BLD: jax.Array) -> tuple[jax.Array, ...]:
        """in_proj cut into the gate z, the convolution's inputs x and BC, and dt (after softplus).

        B and C serve all heads.
        """
        H = self.num_heads
        widths = (self.d_inner, self.d_inner, 2 * self.d_state, H)
        z, x, BC, dt = fused_linear(self.in_proj, x_BLD, widths, heads=H, cut=2)
        dt_BLH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None, :])
        return z, x, BC, dt_BLH

    def activate(self, x: jax.Array, BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The outputs of the convolution, activated: x_BLHP, B_BLN and C_BLN."""
        x, BC = jax.nn.silu(x), by_rows(jax.nn.silu(BC))
        B, C = map(by_rows, jnp.split(BC, 2, axis=-1))
        return x.reshape(*x.shape[:2], self.num_heads, -1), B, C

    def finish(self, y_BLHP: jax.Array, x_BLHP: jax.Array, z: jax.Array) -> jax.Array:
        """Skip connection, gate, norm and output projection."""
        y_BLHP = y_BLHP + self.D[...][None, None, :, None] * x_BLHP.astype(jnp.float32)
        y = y_BLHP.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(self.norm(y))

    def conv_params(self, dtype) -> tuple[jax.Array, jax.Array]:
        weight_WC, bias_C = whole(self.conv1d_weight[...]), whole(self.conv1d_bias[...])
        return weight_WC.astype(dtype), bias_C.astype(dtype)

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        return self.mix(x_BLD, segment_ids_BL)[0]

    def mix(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The output, and what a state at the end is made of.

        That is (x, BC) before the convolution, x_BLHP, dt_BLH, A_H and B_BLN.
        """
        z, x, BC, dt_BLH = self.split_inputs(x_BLD)
        inputs, d_inner = (x, BC), self.d_inner
        weight_WC, bias_C = self.conv_params(z.dtype)
        x = causal_conv(x, weight_WC[:, :d_inner], bias_C[:d_inner], segment_ids_BL)
        BC = causal_conv(BC, weight_WC[:, d_inner:], bias_C[d_inner:], segment_ids_BL)
        x, B, C = self.activate(x, BC)
        A_H = -jnp.exp(self.A_log[...])
        if other := kernel("ssd_backend", self.compute):
            given = (x, dt_BLH, dt_BLH * A_H[None, None, :], B, C, segment_ids_BL)
            axes = ("BLHP", "BLH", "BLH", "BLN", "BLN", "BL")
            y = on_each_device(other, axes, "BLHP", *given)
        else:
            y = ssd(x, dt_BLH, A_H, B, C, segment_ids_BL, block_len=self.compute.ssd_block_len)
        return self.finish(y, x, z), inputs, x, dt_BLH, A_H, B

    def prefill(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, SSMCache]:
        """`__call__`, and the cache (of one layer) of rows that end at `lengths_B`."""
        out_BLD, inputs, x, dt_BLH, A_H, B = self.mix(x_BLD, segment_ids_BL)
        dt_BLH = jnp.where((segment_ids_BL != 0)[..., None], dt_BLH, 0.0)
        before = self.conv1d_weight.shape[0] - 1
        conv = jnp.concatenate([last_positions(a, lengths_B, before) for a in inputs], axis=-1)
        return out_BLD, SSMCache(conv, ssd_final_state(x, dt_BLH, A_H, B))

    def step(
        self, x_R1D: jax.Array, cache: SSMCache, at: tuple, positions_R: jax.Array
    ) -> tuple[jax.Array, SSMCache]:
        """One position of R rows: `ssd_reference` for one t."""
        z, *inputs, dt_R1H = self.split_inputs(x_R1D)
        xBC = jnp.concatenate(inputs, axis=-1)
        taps_RWC = jnp.concatenate([read(cache.conv, at), xBC], axis=1)
        weight_WC, bias_C = self.conv_params(xBC.dtype)
        convolved = bias_C[None, None]
        for tap in range(len(weight_WC)):  # faster than a reduction over so short an axis
            convolved = convolved + taps_RWC[:, tap : tap + 1] * weight_WC[None, None, tap]
        cut = jnp.split(convolved, [self.d_inner], axis=-1)
        x, B, C = (a.astype(jnp.float32) for a in self.activate(*cut))
        dt_RH = dt_R1H[:, 0]
        decay_RH1 = jnp.exp(dt_RH * -jnp.exp(self.A_log[...])[None])[..., None]
        x_dt_RHP = dt_RH[..., None] * x[:, 0]
        state_RHPN = read(cache.state, at)
        # C h_t = a_t C h_{t-1} + (C B_t) dt_t x_t': the new state is written and not read again
        B_C_R11 = jnp.sum(B[:, 0] * C[:, 0], axis=-1)[:, None, None]
        y_RHP = decay_RH1 * jnp.einsum("rhpn,rn->rhp", state_RHPN, C[:, 0]) + B_C_R11 * x_dt_RHP
        state_RHPN = decay_RH1[..., None] * state_RHPN + x_dt_RHP[..., None] * B[:, :, None]
        cache = SSMCache(write(cache.conv, at, taps_RWC[:, 1:]), write(cache.state, at, state_RHPN))
        return self.finish(y_RHP[:, None], x, z), cache
