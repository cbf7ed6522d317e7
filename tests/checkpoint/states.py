"""States to save, and damage to files of checkpoints."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint import leaves


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array


def mesh_of(shape, names):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


MESH = mesh_of((4, 2), ("data", "fsdp"))


def make_state(seed=0):
    """A state of incompressible values, so that the files contain their bytes unchanged."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(8, 1031)).astype(np.float32)
    b = jnp.asarray(rng.normal(size=7), jnp.bfloat16)
    return State(
        step=jnp.int32(5),
        params={
            "w": jax.device_put(w, NamedSharding(MESH, P("fsdp"))),
            "b": jax.device_put(b, NamedSharding(MESH, P())),
            "none": jnp.zeros((0, 3)),
        },
        opt_state=(jax.device_put(w * 2, NamedSharding(MESH, P(("data", "fsdp")))), ()),
        rng=jax.random.key(seed),
    )


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        x, y = np.asarray(leaves.raw(x)), np.asarray(leaves.raw(y))
        assert x.shape == y.shape and x.tobytes() == y.tobytes()


EXTRAS = {"position": 48, "bytes": 1.5e18, "config": {"layout": ["m4", ["T2"], "m4"]}, "s": "é"}


def biggest_file(folder: Path) -> Path:
    return max((folder / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def flip_bit(folder: Path) -> None:
    path = biggest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(biggest_file(folder), 100)


def save_all(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, {"w": jnp.full(5, step, jnp.float32)}, {})
    checkpoints.wait()
