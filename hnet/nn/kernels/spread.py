"""On a mesh each device runs kernels, and what else the compiler cannot cut, on its own rows."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hnet.nn.layers import ROW_AXES

# mesh axes that cut an axis of an array, by its letter; everything else lies whole on each device
CUT_BY = {"B": ROW_AXES, "H": ("tensor",)}


def on_each_device(
    function: Callable[..., jax.Array], axes: tuple[str, ...], out: str, *arrays: jax.Array
) -> jax.Array:
    """function(*arrays) on the mesh that the caller traces under, if any.

    axes: the letters of each array's axes ("BLHK"), out: those of the result. Rows lie over the
    mesh axes `data` and `fsdp`, heads over `tensor`; an axis that they do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:  # no mesh, or already one device's part
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
