"""The mesh and the one table that says where every array lives."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.errors import ConfigError
from hnet.nn.layers import ROW_AXES

BATCH = P(ROW_AXES)  # rows; every activation is sharded on its rows alone

# Parameter path -> spec of its trailing axes; the first match wins. Layers of a run are stacked
# on a leading axis, which is never sharded. fsdp cuts rows, the axis that a matmul sums over: the
# compiler for TPUs scatters the gradients of these as it sums them, not always those of columns.
# tensor cuts heads, the MLP's and Mamba's inner width; the weights into these
# hold several parts side by side, so they are stored with their rows cut (see `fused_linear`).
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r".*/(Wqkv|in_proj|fc1)/kernel", P(("fsdp", "tensor"), None)),
    (r".*/(out_proj|fc2)/kernel", P(("tensor", "fsdp"), None)),
    (r".*(residual_proj|q_proj_layer|k_proj_layer)/kernel", P("fsdp", None)),
    (r"embeddings/embedding", P(None, "fsdp")),
    (r"lm_head/kernel", P("fsdp", None)),
    (r".*", P()),
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on at most one of them means all that are left."""

    data: int = -1
    """copies of the parameters, each on its own rows"""
    fsdp: int = 1
    """rows too, with parameters and optimizer state cut over the axis"""
    tensor: int = 1
    """attention heads, MLP and Mamba inner width cut over the axis"""


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over all (or the given) devices. Raises ConfigError if the axes do not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if bad := [f"mesh.{k}={v}" for k, v in sizes.items() if v < 1 and v != -1]:
        raise ConfigError(f"{', '.join(bad)}: use 1 or more, or -1 for all devices that are left")
    free = [k for k, v in sizes.items() if v == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{' and mesh.'.join(free)} are all -1: leave at most one open")
    fixed = math.prod(v for v in sizes.values() if v != -1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"mesh.{k}={v}" for k, v in sizes.items())
        raise ConfigError(
            f"{asked} does not fit {len(devices)} devices: make the product {len(devices)}, "
            "or set one axis to -1"
        )
    grid = np.array(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of one parameter; an axis that its mesh axis does not divide stays whole."""
    spec = next(spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, name))
    if len(spec) > len(shape):
        return P()
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return P(*(a if a and n % _devices(a, mesh) == 0 else None for a, n in zip(axes, shape)))


def _devices(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of a train state; optimizer moments lie where their parameter does."""

    def sharding(path, leaf):
        return NamedSharding(mesh, parameter_spec(_parameter_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def _parameter_name(path: tuple) -> str:
    """The part of a leaf's path from the model's first module on."""
    name = path_name(path)
    match = re.search(r"(?:^|/)((?:backbone|embeddings|lm_head)/.*)", name)
    return match.group(1) if match else name


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def check_batch(rows: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ConfigError unless every device gets the same number of rows in every micro-batch."""
    share = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if rows % share:
        raise ConfigError(
            f"data.batch_size={rows} is not a multiple of mesh.data * mesh.fsdp * "
            f"train.accumulate = {share}: use e.g. {share * max(1, -(-rows // share))}"
        )
