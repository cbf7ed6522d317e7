"""Mamba-2 (arXiv 2405.21060): the SSD recurrence as block matmuls, and the mixer around it.

Axes here: H heads, P channels a head, N state size, T positions a block, K blocks.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.cache import SSMCache, last_positions, read, write
from hnet.nn.kernels.spread import on_each_device
from hnet.nn.kernels.table import kernel
from hnet.nn.layers import RMSNorm, linear


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


@jax.custom_vjp
def segment_sum_exp(log_a: jax.Array, visible: jax.Array) -> jax.Array:
    """exp(sum_{j < r <= i} log_a[..., r]) at [..., i, j] where `visible`, else 0.

    log_a is (..., T), visible broadcasts to (..., T, T) and lies in the lower triangle. The forward
    pass subtracts two cumulative sums. Differentiating that form cancels almost everything for a
    head that forgets fast, so the backward pass sums the gradients of just the entries that
    contain each factor.
    """
    total = jnp.cumsum(log_a, axis=-1)
    return jnp.exp(jnp.where(visible, total[..., :, None] - total[..., None, :], -jnp.inf))


def _segment_sum_exp_fwd(log_a, visible):
    out = segment_sum_exp(log_a, visible)
    return out, out


def _segment_sum_exp_bwd(out, grad):
    T = out.shape[-1]
    from_r = jnp.triu(jnp.ones((T, T), out.dtype))  # [r, i]: i >= r
    before_r = jnp.tril(jnp.ones((T, T), bool), -1)  # [r, j]: j < r
    per_rj = jnp.matmul(from_r, grad * out, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.where(before_r, per_rj, 0), axis=-1), None


segment_sum_exp.defvjp(_segment_sum_exp_fwd, _segment_sum_exp_bwd)


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

    def einsum(spec, *operands):
        cast = [a.astype(dtype) for a in operands]
        return jnp.einsum(spec, *cast, preferred_element_type=jnp.float32)

    x, dt, B, C, segment_ids = map(blocks, (x_BLHP, dt_BLH, B_BLN, C_BLN, segment_ids_BL))
    log_a_BKHT = (dt * A_H[None, None, None, :]).swapaxes(2, 3)
    x_dt = x.astype(jnp.float32) * dt[..., None]

    same_BKTT = segment_ids[:, :, :, None] == segment_ids[:, :, None, :]
    visible_BKTT = same_BKTT & jnp.tril(jnp.ones((T, T), bool))[None, None]
    decay_BKHTT = segment_sum_exp(log_a_BKHT, visible_BKTT[:, :, None])
    scores_BKTT = einsum("bkin,bkjn->bkij", C, B)
    y = einsum("bkhij,bkjhp->bkihp", decay_BKHTT * scores_BKTT[:, :, None], x_dt)
    if K == 1:
        return y.reshape(x_BLHP.shape)

    last_BK = segment_ids[:, :, -1]
    after_BKHT = jnp.pad(log_a_BKHT[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
    to_end_BKHT = jnp.exp(jax.lax.cumsum(after_BKHT, axis=3, reverse=True))
    to_end_BKHT = jnp.where((segment_ids == last_BK[..., None])[:, :, None], to_end_BKHT, 0.0)
    x_end = x_dt * to_end_BKHT.transpose(0, 1, 3, 2)[..., None]
    state_BKHPN = einsum("bktn,bkthp->bkhpn", B, x_end)

    # State entering block k+1 = (state entering block k, decayed) + (what block k adds); nothing
    # survives a block whose end lies in another segment than the end of the block before.
    stays_BK = jnp.pad(last_BK[:, 1:] == last_BK[:, :-1], ((0, 0), (1, 0)))
    from_start_BKHT = jnp.exp(jnp.cumsum(log_a_BKHT, axis=-1))
    carry_BKH = jnp.where(stays_BK[..., None], from_start_BKHT[..., -1], 0.0)

    def pass_on(state_BHPN, inputs):
        added_BHPN, carry_BH = inputs
        return carry_BH[:, :, None, None] * state_BHPN + added_BHPN, state_BHPN

    by_block = (state_BKHPN.swapaxes(0, 1), carry_BKH.swapaxes(0, 1))
    _, entering = jax.lax.scan(pass_on, jnp.zeros_like(state_BKHPN[:, 0]), by_block)
    entering_BKHPN = entering.swapaxes(0, 1)

    before_BK = jnp.pad(last_BK[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    reaches_BKT = segment_ids == before_BK[..., None]
    from_start_BKHT = jnp.where(reaches_BKT[:, :, None], from_start_BKHT, 0.0)
    y += einsum("bktn,bkhpn->bkthp", C, entering_BKHPN) * from_start_BKHT.swapaxes(2, 3)[..., None]
    return y.reshape(x.shape[0], K * T, *x.shape[3:])[:, :length]


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

    def split_inputs(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """in_proj cut into the gate z, the convolution's input xBC, and dt (softplus applied)."""
        cuts = [self.d_inner, 2 * self.d_inner + 2 * self.d_state]
        z, xBC, dt = jnp.split(self.in_proj(x_BLD), cuts, axis=-1)
        dt_BLH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None, :])
        return z, xBC, dt_BLH

    def split_conv(self, xBC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The activated convolution output cut into x_BLHP, B_BLN and C_BLN."""
        cuts = [self.d_inner, self.d_inner + self.d_state]
        x, B, C = jnp.split(jax.nn.silu(xBC), cuts, axis=-1)
        return x.reshape(*x.shape[:2], self.num_heads, -1), B, C

    def finish(self, y_BLHP: jax.Array, x_BLHP: jax.Array, z: jax.Array) -> jax.Array:
        """Skip connection, gate, norm and output projection."""
        y_BLHP = y_BLHP + self.D[...][None, None, :, None] * x_BLHP.astype(jnp.float32)
        y = y_BLHP.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(self.norm(y))

    def conv_params(self, dtype) -> tuple[jax.Array, jax.Array]:
        return self.conv1d_weight[...].astype(dtype), self.conv1d_bias[...].astype(dtype)

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        return self.mix(x_BLD, segment_ids_BL)[0]

    def mix(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The output, and what a state at the end is made of: xBC, x_BLHP, dt_BLH, A_H, B_BLN."""
        z, xBC, dt_BLH = self.split_inputs(x_BLD)
        convolved = causal_conv(xBC, *self.conv_params(xBC.dtype), segment_ids_BL)
        x, B, C = self.split_conv(convolved)
        A_H = -jnp.exp(self.A_log[...])
        if other := kernel("ssd_backend", self.compute):
            inputs = (x, dt_BLH, dt_BLH * A_H[None, None, :], B, C, segment_ids_BL)
            axes = ("BLHP", "BLH", "BLH", "BLN", "BLN", "BL")
            y = on_each_device(other, axes, "BLHP", *inputs)
        else:
            y = ssd(x, dt_BLH, A_H, B, C, segment_ids_BL, block_len=self.compute.ssd_block_len)
        return self.finish(y, x, z), xBC, x, dt_BLH, A_H, B

    def prefill(
        self, x_BLD: jax.Array, segment_ids_BL: jax.Array, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, SSMCache]:
        """`__call__`, and the cache (of one layer) of rows that end at `lengths_B`."""
        out_BLD, xBC, x, dt_BLH, A_H, B = self.mix(x_BLD, segment_ids_BL)
        dt_BLH = jnp.where((segment_ids_BL != 0)[..., None], dt_BLH, 0.0)
        conv = last_positions(xBC, lengths_B, self.conv1d_weight.shape[0] - 1)
        return out_BLD, SSMCache(conv, ssd_final_state(x, dt_BLH, A_H, B))

    def step(
        self, x_R1D: jax.Array, cache: SSMCache, at: tuple, positions_R: jax.Array
    ) -> tuple[jax.Array, SSMCache]:
        """One position of R rows: `ssd_reference` for one t."""
        z, xBC, dt_R1H = self.split_inputs(x_R1D)
        taps_RWC = jnp.concatenate([read(cache.conv, at), xBC], axis=1)
        weight_WC, bias_C = self.conv_params(xBC.dtype)
        convolved = bias_C[None, None]
        for tap in range(len(weight_WC)):  # faster than a reduction over so short an axis
            convolved = convolved + taps_RWC[:, tap : tap + 1] * weight_WC[None, None, tap]
        x, B, C = (a.astype(jnp.float32) for a in self.split_conv(convolved))
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
