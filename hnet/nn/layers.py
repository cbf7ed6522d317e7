"""RMSNorm, SwiGLU, rotary positions, and helpers for packed rows."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hnet.nn.parameters import metadata, parameter

MATMUL = "matmul"  # checkpoint name of products with weights, for rematerialisation
ROW_AXES = ("data", "fsdp")  # mesh axes that shard rows
NORM_EPS = 1e-5
INIT_STD = 0.02  # default standard deviation of the weights of linear layers (goombalab/hnet)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrain x (B, ...) to be sharded over its rows only.

    Parameters are sharded over ``fsdp`` too. Without this constraint XLA replicates the rows,
    shards channels and all-reduces the output of every matmul; with it, XLA gathers the layer's
    parameters. Returns x unchanged without a mesh, or if the mesh does not divide the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in ROW_AXES if mesh.shape.get(a, 1) > 1)
    is_manual = AxisType.Manual in mesh.axis_types  # already in a shard_map
    if is_manual or x.shape[0] % math.prod(mesh.shape[a] for a in axes):
        return x
    if not axes and tensor_devices() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(axes or None))


def tensor_devices() -> int:
    """Size of the axis ``tensor`` of the current mesh: devices that share the width of a layer."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if AxisType.Manual in mesh.axis_types else mesh.shape.get("tensor", 1)


def replicate(parameter: jax.Array) -> jax.Array:
    """Replicate a small parameter on all devices."""
    if tensor_devices() == 1:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, P())


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


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; returns float32."""

    def __init__(self, d_model: int):
        self.scale = parameter(jnp.ones((d_model,), jnp.float32), "channels", decay=False)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return rms_norm(x_BLD, self.scale[...])


def matmul(x_XD: jax.Array, weight_DF: jax.Array, precision=None, inputs=None) -> jax.Array:
    """x @ weight, with a checkpoint name for rematerialisation (`hnet.nn.isotropic`).

    inputs: dtype to which the operands of this product and of its derivatives are rounded; sums and
    results are then float32. None: no rounding.
    """
    return checkpoint_name(_matmul(x_XD, weight_DF, precision, inputs), MATMUL)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_XD: jax.Array, weight_DF: jax.Array, precision, inputs) -> jax.Array:
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
    """x is transposed in memory: XLA's CPU backend has no product of bfloat16 with float32 result
    for some forms that contract the rows of both operands."""
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    x_YD, grad_YF = (a.reshape(-1, a.shape[-1]) for a in (x_XD, grad_XF))
    x_DY = jax.lax.optimization_barrier(x_YD.T)
    return product(grad_XF, weight_DF.T), product(x_DY, grad_YF)


def rounded(x: jax.Array, dtype: str | None) -> jax.Array:
    """x in `dtype`, or x itself if that is None."""
    return x if dtype is None else x.astype(dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def linear(
    d_in: int,
    d_out: int,
    axes: str,
    *,
    std: float = INIT_STD,
    dtype,
    inputs: str | None = None,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer without bias: float32 weights from N(0, std^2), matmul in `dtype`.

    inputs: see `matmul`.
    """
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        d_in, d_out, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs,
        kernel_metadata=metadata(axes),
        dot_general=lambda x, weight, *_, **__: matmul(x, weight, inputs=inputs),
    )  # fmt: skip


def fused_linear(
    layer: nnx.Linear,
    x_BLD: jax.Array,
    widths: tuple[int, ...],
    *,
    heads: int,
    cut: int | None = None,
) -> list[jax.Array]:
    """Output of a linear layer, split into parts of `widths`; the smaller array is split.

    With many positions this is the weight: each output and its gradient is then a separate array,
    without a concatenation or a split. With few positions it is the output.

    If the mesh axis ``tensor`` has several devices, each of the first `cut` parts (None: all),
    which have equal widths, is sharded over them by its `heads`; the other parts are replicated. In
    the official weights the parts are concatenated, so a shard of the columns would not be a shard
    of each part. Weights are stored sharded over their rows and resharded to the columns that a
    device computes, which costs less than moving activations.
    """
    kernel, ends = layer.kernel[...], list(itertools.accumulate(widths))
    devices = tensor_devices()
    if devices == 1 and x_BLD.size // len(kernel) < len(kernel):
        return jnp.split(layer(x_BLD), ends[:-1], axis=-1)
    x_BLD, kernel = x_BLD.astype(layer.dtype), kernel.astype(layer.dtype)
    if devices == 1:
        return [
            layer.dot_general(x_BLD, kernel[:, end - width : end])
            for width, end in zip(widths, ends)
        ]
    place = jax.lax.with_sharding_constraint
    stored = P("tensor" if x_BLD.shape[-1] % devices == 0 else None, None)
    kernel = place(kernel, stored)
    cut = (len(widths) if cut is None else cut) if heads % devices == 0 else 0
    parts = []
    if cut:
        together = place(kernel[:, : ends[cut - 1]], stored).reshape(-1, cut, widths[0])
        together = place(together, P(None, None, "tensor"))
        y_BLPF = jnp.einsum("bld,dpf->blpf", x_BLD, together)
        unconstrained = P.UNCONSTRAINED
        y_BLPF = place(y_BLPF, P(unconstrained, unconstrained, None, "tensor"))
        parts += [y_BLPF[:, :, i] for i in range(cut)]
    for width, end in zip(widths[cut:], ends[cut:]):
        parts.append(constrain_rows(x_BLD @ place(kernel[:, end - width : end], P())))
    return parts


class SwiGLU(nnx.Module):
    """fc2(y * silu(gate)) with (y, gate) = fc1(x) (official order of the halves)."""

    def __init__(self, d_model: int, d_mlp: int, *, out_std: float, **options):
        """options: those of `linear`."""
        self.fc1 = linear(d_model, 2 * d_mlp, "embed_fused out", **options)
        self.fc2 = linear(d_mlp, d_model, "mlp out", std=out_std, **options)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        d_mlp = self.fc2.in_features
        y_BLF, gate_BLF = fused_linear(self.fc1, x_BLD, (d_mlp, d_mlp), heads=d_mlp)
        return self.fc2(gated(y_BLF, gate_BLF))


def rotary(
    x_BLHK: jax.Array, positions_BL: jax.Array, rotary_dim: int, base: float = 1e4
) -> jax.Array:
    """Rotate the first `rotary_dim` channels of each head by their position.

    Channel i is paired with i + rotary_dim / 2 (the non-interleaved form of arXiv 2104.09864);
    the remaining channels pass unchanged.
    """
    half = rotary_dim // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / max(half, 1))
    angle_BLK = positions_BL.astype(jnp.float32)[:, :, None] * frequency_K[None, None, :]
    cos, sin = jnp.cos(angle_BLK)[:, :, None, :], jnp.sin(angle_BLK)[:, :, None, :]
    x1, x2, rest = jnp.split(x_BLHK.astype(jnp.float32), [half, rotary_dim], axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return rotated.astype(x_BLHK.dtype)


def segment_starts(segment_ids_BL: jax.Array) -> jax.Array:
    """True where a position's segment differs from that of the position before, and at 0."""
    changed_BL = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return jnp.pad(changed_BL, ((0, 0), (1, 0)), constant_values=True)


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Index of each position within its own segment, int32."""
    index_L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)
    start_BL = jnp.where(segment_starts(segment_ids_BL), index_L[None, :], 0)
    return index_L[None, :] - jax.lax.cummax(start_BL, axis=1)
