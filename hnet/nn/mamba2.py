"""The Mamba-2 mixer (arXiv 2405.21060): projections and a short convolution around `hnet.nn.ssd`.

Axes here: H heads, P channels a head, N state size, C channels, W taps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig, StageConfig
from hnet.nn.cache import SSMCache, last_positions, read, write
from hnet.nn.kernels.spread import on_each_device
from hnet.nn.kernels.table import kernel
from hnet.nn.layers import (
    RMSNorm,
    by_rows,
    fused_linear,
    gated,
    linear,
    silu_and_grad,
    whole,
)
from hnet.nn.parameters import parameter
from hnet.nn.ssd import ssd, ssd_final_state


@jax.custom_vjp
def causal_conv_silu(x_BLC, weight_WC, bias_C, segment_ids_BL) -> jax.Array:
    """silu of a depthwise causal convolution that sees no other segment.

    Tap W-1 is the position itself. Computed in the dtype of x. silu ends with a division, which XLA
    on a CPU makes once; a product it would make again, with the convolution, wherever it is read.
    """
    conv_BLC = _convolved(x_BLC, weight_WC, bias_C, _taps(segment_ids_BL, weight_WC))
    return conv_BLC / (1 + jnp.exp(-conv_BLC))


def _taps(segment_ids_BL: jax.Array, weight_WC: jax.Array) -> jax.Array:
    """Whether the position `back` places before is in the same segment, by back; (W, B, L, 1)."""
    L, same = segment_ids_BL.shape[1], [jnp.ones_like(segment_ids_BL, bool)]
    for back in range(1, len(weight_WC)):
        same_BL = segment_ids_BL[:, back:] == segment_ids_BL[:, : max(L - back, 0)]
        same.append(jnp.pad(same_BL, ((0, 0), (min(back, L), 0))))
    return jnp.stack(same)[..., None]


def _earlier(x_BLC: jax.Array, taps_WBL1: jax.Array) -> list[jax.Array]:
    """x `back` places before each position, 0 in another segment, for each tap.

    The padded rows are made first: cut out of one array, the taps are read in one pass.
    """
    before, L = len(taps_WBL1) - 1, x_BLC.shape[1]
    padded = jnp.pad(x_BLC, ((0, 0), (before, 0), (0, 0)))
    shifted = [padded[:, before - back : before - back + L] for back in range(before + 1)]
    return [jnp.where(same_BL1, a_BLC, 0) for same_BL1, a_BLC in zip(taps_WBL1, shifted)]


def _convolved(x_BLC, weight_WC, bias_C, taps_WBL1):
    out_BLC = bias_C[None, None, :]
    for shifted_BLC, weight_C in zip(_earlier(x_BLC, taps_WBL1), weight_WC[::-1]):
        out_BLC = out_BLC + shifted_BLC * weight_C[None, None, :]
    return out_BLC


def _causal_conv_silu_bwd(saved, dout_BLC):
    x_BLC, weight_WC, bias_C, segment_ids_BL = saved
    taps_WBL1 = _taps(segment_ids_BL, weight_WC)
    conv_BLC = _convolved(x_BLC, weight_WC, bias_C, taps_WBL1)
    dconv_BLC = (dout_BLC * silu_and_grad(conv_BLC)[1]).astype(x_BLC.dtype)
    L, after = x_BLC.shape[1], ((0, 0), (0, len(weight_WC) - 1), (0, 0))
    padded = jnp.pad(dconv_BLC, after)
    dx_BLC, dweights = jnp.zeros_like(x_BLC), []
    for back, same_BL1 in enumerate(taps_WBL1):
        same_BL1 = jnp.pad(same_BL1, after)[:, back : back + L]
        from_later_BLC = jnp.where(same_BL1, padded[:, back : back + L], 0)
        dx_BLC += from_later_BLC * weight_WC[-1 - back][None, None, :]
        dweights.append(jnp.sum(from_later_BLC * x_BLC, axis=(0, 1)))
    return dx_BLC, jnp.stack(dweights[::-1]), jnp.sum(dconv_BLC, axis=(0, 1)), None


causal_conv_silu.defvjp(lambda *inputs: (causal_conv_silu(*inputs), inputs), _causal_conv_silu_bwd)


class Mamba2(nnx.Module):
    """The official Mamba-2 mixer, one group: in_proj -> conv -> SSD -> gated norm -> out_proj."""

    def __init__(self, config: HNetConfig, stage: StageConfig, *, out_std: float, rngs: nnx.Rngs):
        ssm, dtype, key = config.ssm, config.compute.dtype, rngs.params
        self.d_inner = ssm.expand * stage.d_model
        self.num_heads = self.d_inner // ssm.head_dim
        self.d_state, self.dtype = ssm.d_state, jnp.dtype(dtype)
        self.compute = config.compute
        H, C = self.num_heads, self.d_inner + 2 * ssm.d_state
        self.in_proj = linear(
            stage.d_model, self.d_inner + C + H, "embed_fused out", dtype=dtype, rngs=rngs
        )
        # torch's default for Conv1d, which the official initialisation leaves alone
        bound = ssm.d_conv**-0.5
        weight_WC, bias_C = (
            jax.random.uniform(key(), shape, jnp.float32, -bound, bound)
            for shape in ((ssm.d_conv, C), (C,))
        )
        self.conv1d_weight = parameter(weight_WC, "taps channels")
        self.conv1d_bias = parameter(bias_C, "channels", decay=False)
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1]; A is uniform in [1, 16]
        log_dt = jax.random.uniform(key(), (H,), jnp.float32, jnp.log(1e-3), jnp.log(1e-1))
        dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
        A_H = jax.random.uniform(key(), (H,), jnp.float32, 1.0, 16.0)
        self.dt_bias = parameter(dt + jnp.log(-jnp.expm1(-dt)), "channels", decay=False)
        self.A_log = parameter(jnp.log(A_H), "channels", decay=False)
        self.D = parameter(jnp.ones((H,), jnp.float32), "channels", decay=False)
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = linear(
            self.d_inner, stage.d_model, "inner out", std=out_std, dtype=dtype, rngs=rngs
        )

    def split_inputs(self, x_BLD: jax.Array) -> tuple[jax.Array, ...]:
        """in_proj cut into the gate z, the convolution's inputs x and BC, and dt (after softplus).

        B and C serve all heads.
        """
        H = self.num_heads
        widths = (self.d_inner, self.d_inner, 2 * self.d_state, H)
        z, x, BC, dt = fused_linear(self.in_proj, x_BLD, widths, heads=H, cut=2)
        dt_BLH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None, :])
        return z, x, BC, dt_BLH

    def heads(self, x: jax.Array, BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The activated outputs of the convolution, cut up: x_BLHP, B_BLN and C_BLN."""
        B, C = map(by_rows, jnp.split(by_rows(BC), 2, axis=-1))
        return x.reshape(*x.shape[:2], self.num_heads, -1), B, C

    def finish(self, y_BLHP: jax.Array, x_BLHP: jax.Array, z: jax.Array) -> jax.Array:
        """Skip connection, gate, norm and output projection."""
        y_BLHP = y_BLHP + self.D[...][None, None, :, None] * x_BLHP.astype(jnp.float32)
        return self.out_proj(self.norm(gated(y_BLHP.reshape(z.shape), z.astype(jnp.float32))))

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
        x = causal_conv_silu(x, weight_WC[:, :d_inner], bias_C[:d_inner], segment_ids_BL)
        BC = causal_conv_silu(BC, weight_WC[:, d_inner:], bias_C[d_inner:], segment_ids_BL)
        x, B, C = self.heads(x, BC)
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
        cut = jnp.split(jax.nn.silu(convolved), [self.d_inner], axis=-1)
        x, B, C = (a.astype(jnp.float32) for a in self.heads(*cut))
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
