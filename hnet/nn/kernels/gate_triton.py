"""Gate and norm of Mamba-2, rms_norm(y silu(z)), as Pallas kernels for NVIDIA GPUs (Triton).

A program goes over its rows and holds one of them in registers, so that HBM holds only inputs and
outputs. XLA needs one pass for the sum of squares and another for the rest. Not yet run on a GPU.

Axes here: R rows (positions of all rows of the batch), D channels, G programs.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hnet.nn.kernels.derivatives import NORM_EPS

ROWS = 32  # most rows per program
WARPS = 8


def gate_norm_triton(y_BLD, z_BLD, scale_D, *, interpret=False) -> jax.Array:
    """x / rms(x) * scale with x = y silu(z), in float32 in between; in the dtype of z.

    interpret: run as ordinary JAX, on any device.
    """
    D = z_BLD.shape[-1]
    out_RD = _gate_norm(interpret, y_BLD.reshape(-1, D), z_BLD.reshape(-1, D), scale_D)
    return out_RD.reshape(z_BLD.shape)


def _pieces(D: int) -> list[pl.Slice]:
    """Slices of D channels; Triton computes with arrays whose sizes are powers of 2."""
    sizes = [1 << bit for bit in reversed(range(D.bit_length())) if D >> bit & 1]
    return [pl.ds(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _run(kernel, name: str, interpret: bool, inputs: list, scale_D, outputs: list, sums: int):
    """Call `kernel` on blocks of rows; `sums`: number of float32 outputs (G, D), one row each."""
    R, D = inputs[0].shape
    rows = math.gcd(R, ROWS)
    block = pl.BlockSpec((rows, D), lambda g: (g, 0))
    whole, one = pl.BlockSpec((D,), lambda g: (0,)), pl.BlockSpec((None, D), lambda g: (g, 0))
    partial_sums = [jax.ShapeDtypeStruct((R // rows, D), jnp.float32)] * sums
    options = {}
    if not interpret:
        from jax.experimental.pallas import triton

        options["compiler_params"] = triton.CompilerParams(num_warps=WARPS, num_stages=2)
    return pl.pallas_call(
        kernel,
        grid=(R // rows,),
        in_specs=[*[block] * len(inputs), whole],
        out_specs=[*[block] * len(outputs), *[one] * sums],
        out_shape=[*[jax.ShapeDtypeStruct((R, D), d) for d in outputs], *partial_sums],
        interpret=interpret,
        name=name,
        **options,
    )(*inputs, scale_D)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate_norm(interpret, y_RD, z_RD, scale_D) -> jax.Array:
    (out_RD,) = _run(
        _forward_kernel, "gate_norm", interpret, [y_RD, z_RD], scale_D, [z_RD.dtype], 0
    )
    return out_RD


def _gate_norm_bwd(interpret, saved, dout_RD):
    y_RD, z_RD, scale_D = saved
    dy_RD, dz_RD, dscale_GD = _run(
        _gradient_kernel, "gate_norm_gradient", interpret, [y_RD, z_RD, dout_RD], scale_D,
        [y_RD.dtype, z_RD.dtype], 1,
    )  # fmt: skip
    return dy_RD, dz_RD, jnp.sum(dscale_GD, axis=0)


_gate_norm.defvjp(
    lambda interpret, *inputs: (_gate_norm(interpret, *inputs), inputs), _gate_norm_bwd
)


def _gated(y, z, r, at):
    """(y, z, sigmoid(z), y silu(z)) of one slice of row r, float32."""
    y_D, z_D = y[r, at].astype(jnp.float32), z[r, at].astype(jnp.float32)
    sigmoid_D = 1 / (1 + jnp.exp(-z_D))
    return y_D, z_D, sigmoid_D, y_D * z_D * sigmoid_D


def _forward_kernel(y, z, scale, out):
    rows, D = y.shape

    def row(r, carry):
        gated = [_gated(y, z, r, at)[-1] for at in _pieces(D)]
        mean = sum(jnp.sum(x_D * x_D) for x_D in gated) / D
        rms = jax.lax.rsqrt(mean + NORM_EPS)
        for at, x_D in zip(_pieces(D), gated):
            out[r, at] = (x_D * rms * scale[at]).astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, rows, row, 0)


def _gradient_kernel(y, z, dout, scale, dy, dz, dscale):
    """As `derivatives.rms_norm` and `gated`; dscale: the sum over this program's rows."""
    rows, D = y.shape
    pieces = _pieces(D)

    def row(r, sums):
        parts = [(*_gated(y, z, r, at), dout[r, at].astype(jnp.float32)) for at in pieces]
        mean = sum(jnp.sum(x_D * x_D) for *_, x_D, _ in parts) / D
        rms = jax.lax.rsqrt(mean + NORM_EPS)
        products = [dout_D * x_D for *_, x_D, dout_D in parts]
        shrink = sum(jnp.sum(p_D * scale[at]) for p_D, at in zip(products, pieces))
        shrink = shrink * (rms * rms * rms) / D
        for at, (y_D, z_D, sigmoid_D, x_D, dout_D) in zip(pieces, parts):
            dx_D = dout_D * scale[at] * rms - x_D * shrink
            dy[r, at] = (dx_D * z_D * sigmoid_D).astype(dy.dtype)
            silu_grad_D = sigmoid_D * (1 + z_D * (1 - sigmoid_D))
            dz[r, at] = (dx_D * y_D * silu_grad_D).astype(dz.dtype)
        return tuple(s_D + p_D * rms for s_D, p_D in zip(sums, products))

    zeros = tuple(jnp.zeros((at.size,), jnp.float32) for at in pieces)
    for at, s_D in zip(pieces, jax.lax.fori_loop(0, rows, row, zeros)):
        dscale[at] = s_D
