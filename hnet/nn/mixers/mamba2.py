"""The Mamba-2 mixer (arXiv 2405.21060): projections, a short convolution and `hnet.nn.ssd`.

Axes here: H heads, P channels per head, N state size, C channels, W taps.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.cache import RecurrentCache, in_last_segment, last_positions, read, write
from hnet.nn.context import Context, StepContext
from hnet.nn.kernels.convolution import causal_conv_silu, conv_silu_step
from hnet.nn.kernels.derivatives import gated, rounded, skip_gate_norm
from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.kernels.ssd_blocks import ssd_blocks
from hnet.nn.kernels.table import around_ssd, array_block_len, kernel
from hnet.nn.layers import (
    RMSNorm,
    constrain_rows,
    fused_linear,
    linear,
    replicate,
    tensor_devices,
)
from hnet.nn.mixers.base import Mixer
from hnet.nn.parameters import parameter
from hnet.nn.settings import SharedConfig, StackConfig
from hnet.nn.ssd import ssd_final_state


def init_dt_bias(key: jax.Array, heads: int) -> jax.Array:
    """Biases with softplus(bias) log-uniform in [1e-3, 1e-1]."""
    log_dt_H = jax.random.uniform(key, (heads,), jnp.float32, jnp.log(1e-3), jnp.log(1e-1))
    dt_H = jnp.maximum(jnp.exp(log_dt_H), 1e-4)
    return dt_H + jnp.log(-jnp.expm1(-dt_H))


class Mamba2(Mixer):
    """The official Mamba-2 mixer, one group: in_proj -> conv -> SSD -> gated norm -> out_proj."""

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        ssm, dtype, key = config.ssm, config.compute.dtype, rngs.params
        make = partial(linear, dtype=dtype, inputs=config.compute.inputs, rngs=rngs)
        self.d_inner = ssm.expand * stage.d_model
        self.num_heads = self.d_inner // ssm.head_dim
        self.d_state, self.dtype = ssm.d_state, jnp.dtype(dtype)
        self.compute = config.compute
        H, C = self.num_heads, self.d_inner + 2 * ssm.d_state
        self.in_proj = make(stage.d_model, self.d_inner + C + H, "embed_fused out")
        # torch's default for Conv1d, which the official initialisation keeps
        bound = ssm.d_conv**-0.5
        weight_WC, bias_C = (
            jax.random.uniform(key(), shape, jnp.float32, -bound, bound)
            for shape in ((ssm.d_conv, C), (C,))
        )
        self.conv1d_weight = parameter(weight_WC, "taps channels")
        self.conv1d_bias = parameter(bias_C, "channels", decay=False)
        dt_bias_H = init_dt_bias(key(), H)
        A_H = jax.random.uniform(key(), (H,), jnp.float32, 1.0, 16.0)
        self.dt_bias = parameter(dt_bias_H, "channels", decay=False)
        self.A_log = parameter(jnp.log(A_H), "channels", decay=False)
        self.D = parameter(jnp.ones((H,), jnp.float32), "channels", decay=False)
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = make(self.d_inner, stage.d_model, "inner out", std=out_std)

    @staticmethod
    def problem(config, stage):
        if (config.ssm.expand * stage.d_model) % config.ssm.head_dim:
            return (
                f"d_model={stage.d_model} times model.ssm.expand={config.ssm.expand} is not a "
                f"multiple of model.ssm.head_dim={config.ssm.head_dim}: choose a d_model that is"
            )
        return None

    def split_inputs(self, x_BLD: jax.Array) -> tuple[jax.Array, ...]:
        """in_proj(x) split into the gate z, the convolution's inputs x and BC, and softplus(dt).

        All heads share B and C.
        """
        H = self.num_heads
        widths = (self.d_inner, self.d_inner, 2 * self.d_state, H)
        z, x, BC, dt = fused_linear(self.in_proj, x_BLD, widths, heads=H, cut=2)
        dt_BLH = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None, :])
        return z, x, BC, dt_BLH

    def heads(self, x: jax.Array, BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The activated outputs of the convolution, split into x_BLHP, B_BLN and C_BLN."""
        B, C = map(constrain_rows, jnp.split(constrain_rows(BC), 2, axis=-1))
        return x.reshape(*x.shape[:2], self.num_heads, -1), B, C

    def finish(self, y_BLHP: jax.Array, x_BLHP: jax.Array, z: jax.Array) -> jax.Array:
        """Skip connection, gate, norm and output projection."""
        if z.dtype == jnp.bfloat16:  # accelerators: the same in fewer passes over memory
            y_BLD, x_BLD = y_BLHP.reshape(z.shape), x_BLHP.reshape(z.shape)
            skip_D = jnp.repeat(self.D[...], z.shape[-1] // self.num_heads)
            return self.out_proj(skip_gate_norm(y_BLD, x_BLD, z, skip_D, self.norm.scale[...]))
        y_BLHP = y_BLHP + self.D[...][None, None, :, None] * x_BLHP
        return self.out_proj(self.norm(gated(y_BLHP.reshape(z.shape), z)))

    def conv_params(self, dtype) -> tuple[jax.Array, jax.Array]:
        weight_WC, bias_C = replicate(self.conv1d_weight[...]), replicate(self.conv1d_bias[...])
        return weight_WC.astype(dtype), bias_C.astype(dtype)

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        return self.mix(x_BLD, context.segment_ids_BL)[0]

    def mix(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The output, and the arrays from which the final state is computed.

        These are (x, BC) before the convolution, x_BLHP, dt_BLH, A_H and B_BLN.
        """
        z, x, BC, dt_BLH = self.split_inputs(x_BLD)
        inputs, d_inner = (x, BC), self.d_inner
        weight_WC, bias_C = self.conv_params(z.dtype)
        around = around_ssd(self.compute) if tensor_devices() == 1 else None
        conv_silu = causal_conv_silu
        if around:
            axes = ("BLC", "WC", "C", "BL")
            conv_silu = partial(sharded_over_rows, around.conv_silu, axes, "BLC")
        x = conv_silu(x, weight_WC[:, :d_inner], bias_C[:d_inner], segment_ids_BL)
        BC = conv_silu(BC, weight_WC[:, d_inner:], bias_C[d_inner:], segment_ids_BL)
        x, B, C = self.heads(x, BC)
        A_H = -jnp.exp(self.A_log[...])
        if other := kernel("ssd_backend", self.compute):
            given = (x, dt_BLH, dt_BLH * A_H[None, None, :], B, C, segment_ids_BL)
            axes = ("BLHP", "BLH", "BLH", "BLN", "BLN", "BL")
            if around:
                y = sharded_over_rows(other, (*axes, "H"), "BLHP", *given, self.D[...])
                given, axes = (y.reshape(z.shape), z, self.norm.scale[...]), ("BLD", "BLD", "D")
                out = sharded_over_rows(around.gate_norm, axes, "BLD", *given)
                return self.out_proj(out), inputs, x, dt_BLH, A_H, B
            y = sharded_over_rows(other, axes, "BLHP", *given)
        else:
            block_len = array_block_len("ssd_backend", self.compute)
            rounded_x = rounded(x, self.compute.inputs)
            y = ssd_blocks(rounded_x, dt_BLH, A_H, B, C, segment_ids_BL, block_len=block_len)
        return self.finish(y, x, z), inputs, x, dt_BLH, A_H, B

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, RecurrentCache]:
        out_BLD, inputs, x, dt_BLH, A_H, B = self.mix(x_BLD, context.segment_ids_BL)
        last_BL1 = in_last_segment(context.segment_ids_BL, lengths_B)[..., None]
        dt_BLH = jnp.where(last_BL1, dt_BLH, 0.0)
        before = self.conv1d_weight.shape[0] - 1
        inputs = (last_positions(jnp.where(last_BL1, a, 0), lengths_B, before) for a in inputs)
        conv = jnp.concatenate([*inputs], axis=-1)
        return out_BLD, RecurrentCache(conv, ssd_final_state(x, dt_BLH, A_H, B))

    def step(
        self, x_R1D: jax.Array, cache: RecurrentCache, at: tuple, context: StepContext
    ) -> tuple[jax.Array, RecurrentCache]:
        """`ssd_reference` for one position."""
        z, *inputs, dt_R1H = self.split_inputs(x_R1D)
        xBC = jnp.concatenate(inputs, axis=-1)
        taps_RWC = jnp.concatenate([context.carried(read(cache.conv, at)), xBC], axis=1)
        weight_WC, bias_C = self.conv_params(xBC.dtype)
        cut = jnp.split(conv_silu_step(taps_RWC, weight_WC, bias_C), [self.d_inner], axis=-1)
        x, B, C = (a.astype(jnp.float32) for a in self.heads(*cut))
        dt_RH = dt_R1H[:, 0]
        decay_RH1 = jnp.exp(dt_RH * -jnp.exp(self.A_log[...])[None])[..., None]
        x_dt_RHP = dt_RH[..., None] * x[:, 0]
        state_RHPN = context.carried(read(cache.state, at))
        state_RHPN = decay_RH1[..., None] * state_RHPN + x_dt_RHP[..., None] * B[:, :, None]
        conv, state = write(cache.conv, at, taps_RWC[:, 1:]), write(cache.state, at, state_RHPN)
        if at[1].are_all:  # with only one reader, XLA overwrites the old state without a copy
            state_RHPN = read(state, at)
        y_RHP = jnp.einsum("rhpn,rn->rhp", state_RHPN, C[:, 0])
        return self.finish(y_RHP[:, None], x, z), RecurrentCache(conv, state)
