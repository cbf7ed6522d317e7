"""What a parameter says about itself: names of its axes, and how it is trained.

One table maps axis names to mesh axes (`hnet.train.sharding.AXES`); the optimizer reads `decay` and
`stage`. No code derives any of this from the name of a parameter.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

_KEY = "info"  # of the metadata of an NNX variable


@dataclass(frozen=True)
class ParameterInfo:
    """Description of one parameter."""

    axes: tuple[str, ...]
    """names of the trailing axes; leading axes that `nnx.vmap` adds (layers) have no name"""
    decay: bool = True
    """whether weight decay applies"""
    per_script: bool = False
    """whether a leading axis holds one copy per script group"""
    stage: int | None = None
    """index of the stage that owns it, outermost first; None outside of a network"""


def metadata(axes: str, *, decay: bool = True) -> dict[str, Any]:
    """Metadata of an NNX variable with these axes, e.g. ``nnx.Param(x, **metadata("embed out"))``.

    Layers of Flax take it as `kernel_metadata`, `bias_metadata` or `embedding_metadata`.
    """
    return {_KEY: ParameterInfo(tuple(axes.split()), decay)}


def parameter(value: jax.Array, axes: str, *, decay: bool = True) -> nnx.Param:
    """A parameter with one axis name per axis of `value`, separated by spaces."""
    if len(axes.split()) != value.ndim:
        raise ValueError(f"axes {axes!r} do not name the {value.ndim} axes of {value.shape}")
    return nnx.Param(value, **metadata(axes, decay=decay))


def set_stage(module: nnx.Module, stage: int) -> None:
    """Give `stage` to all parameters inside that belong to none yet."""
    for path, variable in _parameters(module):
        if (info := _info(path, variable)).stage is None:
            variable.set_metadata(**{_KEY: replace(info, stage=stage)})


def set_per_script(module: nnx.Module) -> None:
    """Mark all parameters inside as stacked along a leading axis of script groups."""
    for path, variable in _parameters(module):
        info = replace(_info(path, variable), per_script=True)
        variable.set_metadata(**{_KEY: info})


def describe(model: nnx.Module) -> dict:
    """A ParameterInfo for every parameter, in the nested dicts that `hnet.model.split` returns.

    Raises ValueError for a parameter that was made without axes.
    """
    return nnx.to_pure_dict(nnx.map_state(_info, nnx.state(model, nnx.Param)))


def map_parameters(function, infos: Any, tree: Any, *rest: Any, other=lambda leaf, *_: leaf) -> Any:
    """`function(info, leaf, *leaves of rest)` on all that has the structure of the parameters.

    tree, rest: equal structures that hold parameters, e.g. a train state, an optimizer state or
    the parameters themselves. `other(leaf, *leaves of rest)` replaces all remaining leaves.
    """
    structure = jax.tree.structure(infos)

    def is_parameters(node):
        return jax.tree.structure(node) == structure

    def one(node, *nodes):
        if is_parameters(node):
            return jax.tree.map(function, infos, node, *nodes)
        return other(node, *nodes)

    return jax.tree.map(one, tree, *rest, is_leaf=is_parameters)


def _parameters(module: nnx.Module) -> list[tuple[tuple, nnx.Param]]:
    return [(path, node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Param)]


def _info(path: tuple, variable: nnx.Param) -> ParameterInfo:
    info = variable.get_metadata().get(_KEY)
    if info is None:
        name = "/".join(map(str, path))
        raise ValueError(f"parameter {name} has no axes: make it with hnet.nn.parameters.parameter")
    return info
