"""Official checkpoints (goombalab/hnet): names and layouts, both ways, bit for bit.

The official state dict has one entry a layer and stores linear weights as (out, in). Ours stacks
the layers of a run and stores (in, out). Everything else is a renaming.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from hnet.config import ConfigError, HNetConfig
from hnet.model import HNetLM

_RENAMED = {
    "embedding": "weight",
    "kernel": "weight",
    "scale": "weight",
    "conv1d_weight": "conv1d.weight",
    "conv1d_bias": "conv1d.bias",
}


def official_names(model: HNetLM) -> Iterator[tuple[tuple, str, int | None]]:
    """(our path, official name, layer within the run or None) of every official entry."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *modules, leaf_name = (str(part) for part in path)
        modules.append(_RENAMED.get(leaf_name, leaf_name))
        if "layers" not in modules:
            yield path, ".".join(modules), None
            continue
        at = modules.index("layers")
        run, stack = int(modules[at + 1]), model
        for part in path[:at]:
            stack = getattr(stack, str(part))
        first = sum(count for _, count in stack.runs[:run])
        for layer in range(leaf.shape[0]):
            name = [*modules[: at + 1], str(first + layer), *modules[at + 2 :]]
            yield path, ".".join(name), layer


def _to_ours(path: tuple, array: np.ndarray) -> np.ndarray:
    if path[-1] == "conv1d_weight":
        return array[:, 0, :].T
    return array.T if path[-1] == "kernel" else array


def _to_theirs(path: tuple, array: np.ndarray) -> np.ndarray:
    if path[-1] == "conv1d_weight":
        return array.T[:, None, :]
    return array.T if path[-1] == "kernel" else array


def from_official(config: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> HNetLM:
    """Build the model of an official configuration and state dict (arrays by official name).

    Raises ConfigError, listing the first offending names, if a name is missing, left over, or has
    another shape than the configuration says.
    """
    model_config = HNetConfig.from_json(dict(config))
    model = nnx.eval_shape(lambda: HNetLM(model_config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    names = list(official_names(model))
    expected = {name for _, name, _ in names}
    allowed = expected | ({"lm_head.weight"} if model_config.tie_embeddings else set())
    problems = [f"missing {n}" for n in sorted(expected - set(params))]
    problems += [f"left over {n}" for n in sorted(set(params) - allowed)]
    layers: dict[tuple, list[np.ndarray]] = {}
    for path, name, layer in names:
        if name not in params:
            continue
        array = _to_ours(path, np.asarray(params[name]))
        shape = flat[path].shape[1:] if layer is not None else flat[path].shape
        if array.shape != shape:
            theirs = _to_theirs(path, np.empty(shape)).shape
            problems.append(f"{name} has shape {np.shape(params[name])}, not {theirs}")
        layers.setdefault(path, []).append(array)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(
            f"official weights do not fit the configuration: {'; '.join(problems[:4])}{more}"
        )
    stacked = {name for name, _, layer in names if layer is not None}
    loaded = {p: np.stack(a) if p in stacked else a[0] for p, a in layers.items()}
    filled = {p: v.replace(jax.numpy.asarray(loaded[p])) for p, v in flat.items()}
    return nnx.merge(graph, nnx.from_flat_state(filled))


def to_official(model: HNetLM) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The official configuration and state dict of a model, inverse of `from_official`.

    A tied head is stored twice, as the official code does.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    params = {}
    for path, name, layer in official_names(model):
        array = np.asarray(flat[path][...] if layer is None else flat[path][layer])
        params[name] = np.ascontiguousarray(_to_theirs(path, array))
    if model.config.tie_embeddings:
        params["lm_head.weight"] = params["embeddings.weight"]
    return model.config.to_json(), params
