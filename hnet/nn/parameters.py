"""Metadata of parameters: names of their axes, and how they are trained.

One table maps axis names to mesh axes (`hnet.train.sharding.AXES`); the optimizer reads `decay` and
`stage`. No code infers any of this from a parameter's name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

_KEY = "info"  # key in the metadata of an NNX variable


@dataclass(frozen=True)
class ParameterInfo:
    """Metadata of one parameter."""

    axes: tuple[str, ...]
    """names of the trailing axes; leading layer axes, added by `nnx.vmap`, have no name"""
    decay: bool = True
    """whether weight decay applies"""
    per_script: bool = False
    """whether a leading axis holds one copy per script group"""
    stage: int | None = None
    """index of the stage that owns it, 0 = outermost; None outside of a network"""
    frozen: bool = False
    """whether training leaves it as it is: no gradient, no update, no optimizer state"""

    @property
    def is_matrix(self) -> bool:
        """Whether its last two axes are input and output of a linear layer."""
        return len(self.axes) == 2 and self.axes[-1] == "out"


def metadata(axes: str, *, decay: bool = True) -> dict[str, Any]:
    """Metadata of an NNX variable with these axes, e.g. ``nnx.Param(x, **metadata("embed out"))``.

    Flax layers take it as `kernel_metadata`, `bias_metadata` or `embedding_metadata`.
    """
    return {_KEY: ParameterInfo(tuple(axes.split()), decay)}


def parameter(value: jax.Array, axes: str, *, decay: bool = True) -> nnx.Param:
    """A parameter with one axis name per axis of `value`, separated by spaces."""
    if len(axes.split()) != value.ndim:
        raise ValueError(f"axes {axes!r} do not name the {value.ndim} axes of {value.shape}")
    return nnx.Param(value, **metadata(axes, decay=decay))


def set_stage(module: nnx.Module, stage: int) -> None:
    """Set `stage` on all parameters of the module that have none yet."""
    for path, variable in _parameters(module):
        if (info := _info(path, variable)).stage is None:
            variable.set_metadata(**{_KEY: replace(info, stage=stage)})


def set_per_script(module: nnx.Module) -> None:
    """Mark all parameters of the module as stacked along a leading axis of script groups."""
    for path, variable in _parameters(module):
        info = replace(_info(path, variable), per_script=True)
        variable.set_metadata(**{_KEY: info})


def set_frozen(module: nnx.Module, is_frozen: Callable[[str], bool]) -> None:
    """Set `frozen` on all parameters with `is_frozen(path)`; a path is like "embeddings/kernel"."""
    for path, variable in _parameters(module):
        if is_frozen("/".join(map(str, path))):
            variable.set_metadata(**{_KEY: replace(_info(path, variable), frozen=True)})


def trained(infos: Any, params: Any) -> Any:
    """`params` with None for each frozen parameter."""
    return jax.tree.map(lambda info, p: None if info.frozen else p, infos, params)


def with_frozen(own: Any, params: Any) -> Any:
    """`own`, the result of `trained`, with the parameters of `params` for each None."""
    return jax.tree.map(lambda p, o: p if o is None else o, params, own)


def describe(model: nnx.Module) -> dict:
    """A ParameterInfo for every parameter, in nested dicts like those of `hnet.model.split`.

    Raises ValueError for a parameter without axes.
    """
    return nnx.to_pure_dict(nnx.map_state(_info, nnx.state(model, nnx.Param)))


def map_parameters(function, infos: Any, tree: Any, *rest: Any, other=lambda leaf, *_: leaf) -> Any:
    """Map `function(info, leaf, *leaves of rest)` over all subtrees that look like the parameters.

    tree, rest: trees of equal structure that contain parameters, e.g. a train state, an optimizer
    state or the parameters themselves; None for a parameter stays None.
    `other(leaf, *leaves of rest)` maps all remaining leaves.
    """
    structure = jax.tree.structure(infos)

    def is_parameters(node):
        return jax.tree.structure(node, is_leaf=lambda leaf: leaf is None) == structure

    def own(info, leaf, *leaves):
        return None if leaf is None else function(info, leaf, *leaves)

    def one(node, *nodes):
        if is_parameters(node):
            return jax.tree.map(own, infos, node, *nodes)
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
