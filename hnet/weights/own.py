"""Models without an official form as one file: our own parameter names, and a JSON of the model.

The JSON is `{"format": "hnet-jax", "model": {...}}`, the model as in the config.json of a run. A
parameter is named by its path, with its axes as our modules have them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import HNetConfig
from hnet.errors import ConfigError, shown
from hnet.fields import from_json, to_json
from hnet.model import HNetLM, abstract
from hnet.weights.official import Leaf, Mismatch

FORMAT = "hnet-jax"


def is_own(content: Any) -> bool:
    """Whether this JSON is of this format, whatever its version of the model says."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def own_json(config: HNetConfig) -> dict[str, Any]:
    """The JSON of a model. Raises ConfigError for one with parts of a module that others lack."""
    content = {"format": FORMAT, "model": to_json(config)}
    config_of_own(content)
    return content


def config_of_own(content: dict[str, Any]) -> HNetConfig:
    """The model of such a JSON. Raises ConfigError, naming the field.

    The JSON is not trusted: parts outside of hnet, which would be imported, are refused.
    """
    if unknown := sorted(content.keys() - {"format", "model"}):
        raise ConfigError(f"configuration has unknown content {shown(unknown)}")
    waiting = [content.get("model")]
    while waiting:
        match waiting.pop():
            case dict() as inner:
                waiting += inner.values()
            case list() as inner:
                waiting += inner
            case str(name) if ":" in name:
                raise ConfigError(
                    f"model names {shown(name)}, a class of another module: only a work directory "
                    "may hold such a model"
                )
    return from_json(HNetConfig, content.get("model"), "model")


def check_own(config: HNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Mismatch if a name is missing, left over, or has another shape than it should."""
    expected = {leaf.names[0]: leaf.shape for leaf in own_leaves(config)}
    problems = [f"missing {name}" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"left over {name}" for name in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{name} has shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise Mismatch(problems)


def own_leaves(config: HNetConfig) -> list[Leaf]:
    """All parameters of a configuration, each under one name, without making any of them."""
    _, params = abstract(config)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [(tuple(key.key for key in keys), leaf) for keys, leaf in flat]
    return [
        Leaf(path, [".".join(map(str, path))], False, leaf.shape, leaf.dtype)
        for path, leaf in paths
    ]


def assemble_own(
    config: HNetConfig,
    file: Mapping[str, np.ndarray],
    *,
    progress: Callable[[list], Iterable],
    dtype_of: Callable[[tuple], jnp.dtype],
) -> HNetLM:
    """The model of a file that `check_own` has passed."""
    graph, params = abstract(config)
    read = {
        leaf.path: jnp.array(file[leaf.names[0]], dtype_of(leaf.path))
        for leaf in progress(own_leaves(config))
    }
    filled = jax.tree_util.tree_map_with_path(
        lambda keys, _: read[tuple(key.key for key in keys)], params
    )
    return nnx.merge(graph, filled)
