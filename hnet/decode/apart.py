"""Layers apart: a model's weights and caches as one array per layer instead of one per run.

A run of equal layers is one scan over stacked arrays. That compiles quickly and suits long rows,
but a scan on a CPU copies each layer's weights, and states that it carries, which for a single
position is most of the work. Steps of a stream therefore run on layers apart. The weights are not
held twice: each layer's array is a view of the stacked one. Where that is not possible, on other
platforms and with sharded weights, layers stay stacked.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from hnet.model import HNetLM
from hnet.nn.isotropic import Isotropic
from hnet.stage import HNet

ALIGNMENT = 64  # bytes; XLA copies arrays that lie otherwise


def can_be_apart(params: Any) -> bool:
    """Whether the arrays are whole on one CPU, so that a part of them can be a view."""
    return all(
        isinstance(a, jax.Array)
        and not isinstance(a, jax.core.Tracer)
        and len(a.devices()) == 1
        and next(iter(a.devices())).platform == "cpu"
        for a in jax.tree.leaves(params)
    )


def model_apart(model: HNetLM) -> HNetLM:
    """A model with the same function whose stacks have one run per layer; `model` is unchanged."""
    graph, state = nnx.split(model)
    found = nnx.merge(graph, state)
    for stack in _stacks(found.backbone):
        layers = []
        for run, (_, count) in zip(stack.layers, stack.runs):
            graph, state = nnx.split(run)
            layers += [
                nnx.merge(graph, jax.tree.map(lambda a, i=i: _layer(a, i), state))
                for i in range(count)
            ]
        stack.layers = nnx.List(layers)
        stack.runs = tuple((kind, 1) for kind, count in stack.runs for _ in range(count))
        stack.is_apart = True
    return found


def _stacks(stage: HNet) -> Iterator[Isotropic]:
    names = ("main_network",) if stage.is_innermost else ("encoder", "decoder")
    for name in names:
        if isinstance(stack := getattr(stage, name), Isotropic):
            yield stack
    if not stage.is_innermost:
        yield from _stacks(stage.main_network)


def _layer(array: jax.Array, index: int) -> jax.Array:
    """array[index : index + 1] without a copy, if the layer begins where an array may."""
    view = np.asarray(array)[index : index + 1]
    (device,) = array.devices()
    if view.__array_interface__["data"][0] % ALIGNMENT:
        return array[index : index + 1]
    return jax.device_put(view, device if array.committed else None, may_alias=True)
