"""The mesh, and the table that maps every parameter axis to mesh axes."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.errors import ConfigError
from hnet.nn.layers import ROW_AXES
from hnet.nn.parameters import ParameterInfo, map_parameters
from hnet.train.config import MeshConfig

BATCH = P(ROW_AXES)  # every activation is sharded over its rows only

# Name of a parameter's axis -> mesh axes. fsdp shards rows, the axis that a matmul sums over: for
# these the TPU compiler uses reduce-scatter for gradients, for columns it does not always.
# tensor shards heads and the inner width of the MLP and of recurrent mixers. Weights into these
# hold several matrices side by side, so they are stored with sharded rows (`fused_linear`).
AXES: dict[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "embed_fused": ("fsdp", "tensor"),
    "heads": ("tensor", "fsdp"),
    "mlp": ("tensor", "fsdp"),
    "inner": ("tensor", "fsdp"),
    "out": None,
    "vocab": None,
    "tables": None,
    "channels": None,
    "taps": None,
    "script": None,
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all). Raises ConfigError if the axes do not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [k for k, v in sizes.items() if v == -1]
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


def parameter_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of a parameter whose trailing axes have these names.

    Leading axes, which stack layers or script groups, are not sharded; neither is an axis whose
    size its mesh axes do not divide. Raises ConfigError for a name that is not in `AXES`.
    """
    if unknown := [name for name in names if name not in AXES]:
        raise ConfigError(
            f"parameter axis {unknown[0]!r} is unknown: use one of {', '.join(AXES)}, "
            "or add it to hnet.train.sharding.AXES"
        )
    axes = (None,) * (len(shape) - len(names)) + tuple(AXES[name] for name in names)
    return P(*(a if a and n % _devices(a, mesh) == 0 else None for a, n in zip(axes, shape)))


def _devices(axes: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def state_shardings(abstract_state: Any, infos: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of a train state; optimizer moments are sharded like their parameter.

    infos: `hnet.nn.parameters.describe` of the model. Leaves of no parameter are replicated.
    """

    def sharding(info: ParameterInfo, leaf):
        return NamedSharding(mesh, parameter_spec(info.axes, leaf.shape, mesh))

    return map_parameters(sharding, infos, abstract_state, other=lambda _: replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def check_batch(rows: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ConfigError unless all devices get equally many rows in every micro-batch."""
    share = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if rows % share:
        raise ConfigError(
            f"data.batch_size={rows} is not a multiple of mesh.data * mesh.fsdp * "
            f"train.accumulate = {share}: use e.g. {share * max(1, -(-rows // share))}"
        )
