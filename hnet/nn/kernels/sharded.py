"""Run kernels, and other code that XLA cannot shard, on each device's own rows of a mesh."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hnet.nn.layers import ROW_AXES

# Mesh axes that shard an array axis, by its letter; all other axes are replicated.
CUT_BY = {"B": ROW_AXES, "H": ("tensor",)}


def sharded_over_rows(
    function: Callable[..., jax.Array], axes: tuple[str, ...], out: str, *arrays: jax.Array
) -> jax.Array:
    """`function(*arrays)` under shard_map on the current mesh; a plain call if there is no mesh.

    axes: letters of each array's axes ("BLHK"). out: letters of the result's axes. Rows are sharded
    over the mesh axes `data` and `fsdp`, heads over `tensor`; an axis whose size these do not
    divide is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:  # no mesh, or already in a shard_map
        return function(*arrays)
    size = {letter: n for name, a in zip(axes, arrays) for letter, n in zip(name, a.shape)}
    cut = {}
    for letter, candidates in CUT_BY.items():
        found = tuple(a for a in candidates if a in mesh.shape)
        if found and size.get(letter, 1) % math.prod(mesh.shape[a] for a in found) == 0:
            cut[letter] = found
    spec = {name: P(*(cut.get(letter) for letter in name)) for name in (*axes, out)}
    run = jax.shard_map(
        function, in_specs=tuple(spec[name] for name in axes), out_specs=spec[out], check_vma=False
    )
    return run(*arrays)
