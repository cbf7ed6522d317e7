"""The derivative of the short causal convolution as a Pallas kernel for NVIDIA GPUs (Triton).

A program is a block of positions and of channels. It computes the gradient before silu again for
each tap instead of writing it, so that HBM holds only inputs and results. XLA fuses the forward
pass as well, but takes four passes for the derivative. Not yet run on a GPU.

Axes here: C channels, W taps, T positions per block, K blocks.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hnet.nn.kernels.convolution import causal_conv_silu
from hnet.nn.layers import segment_positions

POSITIONS, CHANNELS = 64, 64  # most per program
WARPS = 8


def conv_silu_triton(x_BLC, weight_WC, bias_C, segment_ids_BL, *, interpret=False) -> jax.Array:
    """`causal_conv_silu`; the derivative has float32 in between.

    interpret: run as ordinary JAX, on any device.
    """
    return _conv_silu(interpret, x_BLC, weight_WC, bias_C, segment_ids_BL)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_silu(interpret, x_BLC, weight_WC, bias_C, segment_ids_BL) -> jax.Array:
    return causal_conv_silu(x_BLC, weight_WC, bias_C, segment_ids_BL)


def _conv_silu_bwd(interpret, saved, dout_BLC):
    x_BLC, weight_WC, bias_C, segment_ids_BL = saved
    (B, L, C), W = x_BLC.shape, len(weight_WC)
    T, some = math.gcd(L, POSITIONS), math.gcd(C, CHANNELS)
    row = pl.BlockSpec((None, L, some), lambda b, k, c: (b, 0, c))
    block = pl.BlockSpec((None, T, some), lambda b, k, c: (b, k, c))
    reach = pl.BlockSpec((None, L), lambda b, k, c: (b, 0))
    taps, bias = (
        pl.BlockSpec((W, some), lambda b, k, c: (0, c)), pl.BlockSpec((some,), lambda b, k, c: (c,))
    )  # fmt: skip
    sums = pl.BlockSpec((None, None, W + 1, some), lambda b, k, c: (b, k, 0, c))
    options = {}
    if not interpret:
        from jax.experimental.pallas import triton

        options["compiler_params"] = triton.CompilerParams(num_warps=WARPS, num_stages=2)
    dx_BLC, sums_BKXC = pl.pallas_call(
        partial(_gradient_kernel, T=T),
        grid=(B, L // T, C // some),
        in_specs=[row, row, taps, bias, reach],
        out_specs=[block, sums],
        out_shape=[
            jax.ShapeDtypeStruct(x_BLC.shape, x_BLC.dtype),
            jax.ShapeDtypeStruct((B, L // T, W + 1, C), jnp.float32),
        ],
        interpret=interpret,
        name="conv_gradient",
        **options,
    )(x_BLC, dout_BLC, weight_WC, bias_C, segment_positions(segment_ids_BL))
    sums_XC = jnp.sum(sums_BKXC, axis=(0, 1))
    return dx_BLC, sums_XC[:W].astype(weight_WC.dtype), sums_XC[W].astype(bias_C.dtype), None


_conv_silu.defvjp(
    lambda interpret, *inputs: (_conv_silu(interpret, *inputs), inputs), _conv_silu_bwd
)


def _gradient_kernel(x, dout, weight, bias, reach, dx, sums, *, T):
    """reach: number of earlier positions in the same segment. sums: those over this block of the
    gradients of each tap, and of the bias."""
    L, W, f32 = x.shape[0], weight.shape[0], jnp.float32
    at_T = pl.program_id(1) * T + jax.lax.broadcasted_iota(jnp.int32, (T,), 0)
    taps = [weight[W - 1 - back].astype(f32)[None] for back in range(W)]  # by distance

    def before_silu(at_T):
        """Gradient before silu at these positions, and the inputs of each tap."""
        reach_T, inputs = reach[at_T], []
        conv_TC = bias[...].astype(f32)[None]
        for back in range(W):
            earlier_TC = x[jnp.maximum(at_T - back, 0), :].astype(f32)
            inputs.append(jnp.where((reach_T >= back)[:, None], earlier_TC, 0.0))
            conv_TC = conv_TC + inputs[-1] * taps[back]
        sigmoid_TC = 1 / (1 + jnp.exp(-conv_TC))
        silu_grad_TC = sigmoid_TC * (1 + conv_TC * (1 - sigmoid_TC))
        return dout[at_T, :].astype(f32) * silu_grad_TC, inputs

    dconv_TC, inputs = before_silu(at_T)
    sums[W] = jnp.sum(dconv_TC, axis=0)
    for back in range(W):
        sums[W - 1 - back] = jnp.sum(dconv_TC * inputs[back], axis=0)
    dx_TC = dconv_TC * taps[0]
    for back in range(1, W):
        later_T = jnp.minimum(at_T + back, L - 1)
        reads_T = (at_T + back < L) & (reach[later_T] >= back)
        dx_TC += jnp.where(reads_T[:, None], before_silu(later_T)[0] * taps[back], 0.0)
    dx[...] = dx_TC.astype(dx.dtype)
