"""RMSNorm, SwiGLU, rotary positions, and helpers for packed rows."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hnet.nn.kernels.derivatives import gated, rms_norm
from hnet.nn.kernels.derivatives import matmul as plain_matmul
from hnet.nn.parameters import metadata, parameter

MATMUL = "matmul"  # checkpoint name of products with weights, for rematerialisation
ROW_AXES = ("data", "fsdp")  # mesh axes that shard rows
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
    return checkpoint_name(plain_matmul(x_XD, weight_DF, precision, inputs), MATMUL)


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
    """Output of a linear layer, bias included, split into parts of `widths`; the smaller array is
    split.

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
        parts = [
            layer.dot_general(x_BLD, kernel[:, end - width : end])
            for width, end in zip(widths, ends)
        ]
        return _with_bias(layer, parts, ends)
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
    return _with_bias(layer, parts, ends)


def _with_bias(layer: nnx.Linear, parts: list[jax.Array], ends: list[int]) -> list[jax.Array]:
    if layer.bias is None:
        return parts
    biases = jnp.split(layer.bias[...].astype(layer.dtype), ends[:-1])
    return [part + bias[None, None] for part, bias in zip(parts, biases)]


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
    cos, sin = (a[:, :, None, :] for a in _cos_sin(angle_BLK, x_BLHK.dtype))
    x1, x2, rest = jnp.split(x_BLHK.astype(jnp.float32), [half, rotary_dim], axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return rotated.astype(x_BLHK.dtype)


def _cos_sin(angle_BLK: jax.Array, dtype) -> tuple[jax.Array, ...]:
    """Cosine and sine. In float32, i.e. on CPUs, a loop over the halves of a row computes them:
    otherwise XLA computes them again for each head, in each operation that reads them."""
    B, L, K = angle_BLK.shape
    if dtype != jnp.float32 or L % 2:
        return jnp.cos(angle_BLK), jnp.sin(angle_BLK)
    halves = angle_BLK.reshape(B, 2, L // 2, K).swapaxes(0, 1)
    both = jax.lax.map(lambda a: (jnp.cos(a), jnp.sin(a)), halves)
    return tuple(a.swapaxes(0, 1).reshape(B, L, K) for a in both)


def segment_starts(segment_ids_BL: jax.Array) -> jax.Array:
    """True where a position's segment differs from that of the position before, and at 0."""
    changed_BL = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return jnp.pad(changed_BL, ((0, 0), (1, 0)), constant_values=True)


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Index of each position within its own segment, int32."""
    index_L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)
    start_BL = jnp.where(segment_starts(segment_ids_BL), index_L[None, :], 0)
    return index_L[None, :] - jax.lax.cummax(start_BL, axis=1)
