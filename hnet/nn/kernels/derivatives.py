"""RMSNorm, gates and products with weights, whose derivatives by hand spare XLA passes over memory.

Without the derivative each is one line of array code, which `tests/nn/test_layers.py` compares.
"""

from functools import partial

import jax
import jax.numpy as jnp

NORM_EPS = 1e-5


@jax.custom_vjp
def rms_norm(x_BLD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """x / rms(x) * scale, computed in float32 for any input dtype."""
    return _rms_norm_fwd(x_BLD, scale_D)[0]


def _rms_norm_fwd(x_BLD, scale_D):
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
    rms_BL1 = jax.lax.rsqrt(mean_BL1 + NORM_EPS)
    return x32_BLD * rms_BL1 * scale_D[None, None, :], (x_BLD, scale_D, rms_BL1)


def _rms_norm_bwd(saved, dout_BLD):
    """Both sums use one product, which is computed once."""
    x_BLD, scale_D, rms_BL1 = saved
    x32_BLD, precision = x_BLD.astype(jnp.float32), jax.lax.Precision.HIGHEST
    product_BLD = dout_BLD * x32_BLD
    dscale_D = jnp.einsum("bl,bld->d", rms_BL1[..., 0], product_BLD, precision=precision)
    mean_BL1 = jnp.einsum("bld,d->bl", product_BLD, scale_D, precision=precision)[..., None]
    shrink_BL1 = mean_BL1 * (rms_BL1**3 / x_BLD.shape[-1])
    dx_BLD = dout_BLD * scale_D[None, None, :] * rms_BL1 - x32_BLD * shrink_BL1
    return dx_BLD.astype(x_BLD.dtype), dscale_D


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def silu_and_grad(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(x) = x sigmoid(x) and its derivative, for a backward pass.

    The sigmoid is written as a tanh. Written as in the forward pass, XLA would merge the two and
    keep the sigmoids of all layers in memory.
    """
    sigmoid = 0.5 * jnp.tanh(0.5 * x) + 0.5
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


@jax.custom_vjp
def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x silu(gate)."""
    return x * jax.nn.silu(gate)


def _gated_bwd(saved, dout):
    x, gate = saved
    silu, silu_grad = silu_and_grad(gate)
    return dout * silu, dout * x * silu_grad


gated.defvjp(lambda x, gate: (gated(x, gate), (x, gate)), _gated_bwd)


def written_once(*arrays: jax.Array):
    """The arrays, unchanged; XLA does not fuse across this point if the first is bfloat16.

    Accelerators, which compute in bfloat16, are bound by memory traffic: XLA would write an
    intermediate result in float32 to avoid computing it twice.
    """
    if arrays[0].dtype == jnp.bfloat16:
        arrays = jax.lax.optimization_barrier(arrays)
    return arrays if len(arrays) > 1 else arrays[0]


@jax.custom_vjp
def skip_gate_norm(y_BLD, x_BLD, z_BLD, skip_D, scale_D) -> jax.Array:
    """rms_norm((y + skip x) silu(z)) in float32, in the dtype of z.

    Only the inputs and one number per position are saved or written in between.
    """
    return _skip_gate_norm_fwd(y_BLD, x_BLD, z_BLD, skip_D, scale_D)[0]


def _skip_gate_norm_fwd(y_BLD, x_BLD, z_BLD, skip_D, scale_D):
    def gated_sum(y, x, z):
        y, x, z = (a.astype(jnp.float32) for a in (y, x, z))
        return (y + skip_D[None, None] * x) * jax.nn.silu(z)

    inputs = (y_BLD, x_BLD, z_BLD)
    gated_BLD = gated_sum(*inputs)
    mean_BL1 = jnp.mean(jnp.square(gated_BLD), axis=-1, keepdims=True)
    if z_BLD.dtype == jnp.bfloat16:
        *inputs, mean_BL1 = written_once(*inputs, mean_BL1)
        gated_BLD = gated_sum(*inputs)
    rms_BL1 = jax.lax.rsqrt(mean_BL1 + NORM_EPS)
    out_BLD = (gated_BLD * rms_BL1 * scale_D[None, None]).astype(z_BLD.dtype)
    return out_BLD, (y_BLD, x_BLD, z_BLD, skip_D, scale_D, rms_BL1)


def _skip_gate_norm_bwd(saved, dout_BLD):
    y_BLD, x_BLD, z_BLD, skip_D, scale_D, rms_BL1 = saved
    types = [a.dtype for a in (y_BLD, x_BLD, z_BLD)]
    precision = jax.lax.Precision.HIGHEST

    def products():
        y, x, z = (a.astype(jnp.float32) for a in (y_BLD, x_BLD, z_BLD))
        sum_BLD, (silu_BLD, silu_grad_BLD) = y + skip_D[None, None] * x, silu_and_grad(z)
        gated_BLD = sum_BLD * silu_BLD
        product_BLD = dout_BLD.astype(jnp.float32) * gated_BLD
        return sum_BLD, x, silu_BLD, silu_grad_BLD, gated_BLD, product_BLD

    first = products()
    mean_BL = jnp.einsum("bld,d->bl", first[-1], scale_D, precision=precision) / len(scale_D)
    if dout_BLD.dtype == jnp.bfloat16:
        y_BLD, x_BLD, z_BLD, dout_BLD, mean_BL = written_once(
            y_BLD, x_BLD, z_BLD, dout_BLD, mean_BL
        )
        first = products()
    sum_BLD, x32_BLD, silu_BLD, silu_grad_BLD, gated_BLD, product_BLD = first
    dscale_D = jnp.einsum("bl,bld->d", rms_BL1[..., 0], product_BLD, precision=precision)
    dnorm_BLD = dout_BLD.astype(jnp.float32) * scale_D[None, None]
    dgated_BLD = rms_BL1 * (dnorm_BLD - gated_BLD * (mean_BL[..., None] * rms_BL1**2))
    dsum_BLD = dgated_BLD * silu_BLD
    dskip_D = jnp.sum(dsum_BLD * x32_BLD, axis=(0, 1))
    grads = (dsum_BLD, dsum_BLD * skip_D[None, None], dgated_BLD * sum_BLD * silu_grad_BLD)
    grads = written_once(*(g.astype(t) for g, t in zip(grads, types)))
    return *grads, dskip_D, dscale_D


skip_gate_norm.defvjp(_skip_gate_norm_fwd, _skip_gate_norm_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x_XD: jax.Array, weight_DF: jax.Array, precision, inputs) -> jax.Array:
    """x @ weight with a custom derivative. XLA's CPU backend copies the left operand of a product
    that contracts its rows, so the narrower operand goes left."""
    return _matmul_fwd(x_XD, weight_DF, precision, inputs)[0]


def _matmul_fwd(x_XD, weight_DF, precision, inputs):
    x_XD, weight_DF = rounded(x_XD, inputs), rounded(weight_DF, inputs)
    sums = jnp.float32 if inputs else None
    y_XF = jnp.matmul(x_XD, weight_DF, precision=precision, preferred_element_type=sums)
    return y_XF, (x_XD, weight_DF)


def _matmul_bwd(precision, inputs, saved, grad_XF):
    x_XD, weight_DF = saved
    if inputs:
        return _rounded_matmul_bwd(x_XD, weight_DF, rounded(grad_XF, inputs))
    rows = tuple(range(x_XD.ndim - 1))
    product = partial(
        jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())), precision=precision
    )
    if x_XD.shape[-1] > grad_XF.shape[-1]:
        grad_weight_DF = product(grad_XF, x_XD).T
    else:
        grad_weight_DF = product(x_XD, grad_XF)
    return jnp.matmul(grad_XF, weight_DF.T, precision=precision), grad_weight_DF


def _rounded_matmul_bwd(x_XD, weight_DF, grad_XF):
    """No product contracts the rows of its left operand, and none is transposed without
    `transposed`: XLA would swap its operands."""
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    x_YD, grad_YF = (a.reshape(-1, a.shape[-1]) for a in (x_XD, grad_XF))
    if x_XD.shape[-1] > grad_XF.shape[-1]:  # transpose the narrower one
        grad_weight_DF = transposed(product(transposed(grad_YF, 0, 1), x_YD), 0, 1)
    else:
        grad_weight_DF = product(transposed(x_YD, 0, 1), grad_YF)
    return product(grad_XF, weight_DF.T), grad_weight_DF


def transposed(a: jax.Array, first: int, second: int) -> jax.Array:
    """a.swapaxes(first, second) in memory, as two halves.

    XLA merges a transpose with the product that reads or makes the array, past optimization
    barriers too. Its CPU backend computes a product of bfloat16 that contracts the rows of its left
    operand in float32, or fails to compute it ("UNIMPLEMENTED").
    """
    halves = jnp.split(a, [a.shape[second] // 2], second)
    return jnp.concatenate([half.swapaxes(first, second) for half in halves], first)


def rounded(x: jax.Array, dtype: str | None) -> jax.Array:
    """x in `dtype`, or x itself if that is None."""
    return x if dtype is None else x.astype(dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)
