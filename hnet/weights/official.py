"""Official checkpoints (goombalab/hnet): names and layouts, in both directions, bit for bit.

The official state dict has one entry per layer and stores linear weights as (out, in). Ours stacks
the layers of a run and stores (in, out). All other differences are names, and the layout of
conv1d_weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.model import HNetLM, abstract
from hnet.official_config import unofficial_layers

_RENAMED = {
    "embedding": "weight",
    "kernel": "weight",
    "scale": "weight",
    "conv1d_weight": "conv1d.weight",
    "conv1d_bias": "conv1d.bias",
}
HEAD, EMBEDDING = "lm_head.weight", "embeddings.weight"


class Mismatch(ConfigError):
    """Weights that do not fit a configuration; `problems` has one line per parameter."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(
            f"official weights do not fit the configuration: {'; '.join(self.first(4))}"
        )

    def first(self, count: int) -> list[str]:
        """The first `count` problems, and how many more there are."""
        more = len(self.problems) - count
        return self.problems[:count] + ([f"and {more} more"] if more > 0 else [])


class Leaf(NamedTuple):
    """One of our parameters and the names of its official entries."""

    path: tuple
    names: list[str]
    """official names, one per layer if the parameter is stacked"""
    is_stacked: bool
    shape: tuple[int, ...]
    dtype: np.dtype


def check_official(config: HNetConfig) -> None:
    """Raise ConfigError if the official code cannot express this network."""
    if problem := unofficial_layers(config):
        raise ConfigError(f"{problem}: keep this model in its work directory")
    for s, stage in enumerate(config.stages[: config.num_chunked]):
        for name, (own, official) in stage.chunking.unofficial_fields.items():
            raise ConfigError(
                f"model.stages.{s}.chunking.{name}={own!r} has no official form, which is "
                f"{official!r}: keep this model in its work directory"
            )


def check_runs(config: HNetConfig) -> None:
    """Raise ConfigError for sizes that the official kernels do not support: causal_conv1d takes 2
    to 4 taps, flash-attn takes heads of at most 256 channels."""
    for s, stage in enumerate(config.stages):
        mixers = "".join(stage.arch_layout).lower()
        if "m" in mixers and not 2 <= config.ssm.d_conv <= 4:
            raise ConfigError(
                f"model.ssm.d_conv={config.ssm.d_conv} has no official form: the official kernels "
                "take 2 to 4 taps, so keep this model in its work directory"
            )
        if "t" in mixers and (width := stage.d_model // stage.num_heads) > 256:
            raise ConfigError(
                f"model.stages.{s}.num_heads={stage.num_heads} has no official form: its heads "
                f"have {width} channels and the official kernels take 256, so keep this model in "
                "its work directory"
            )


def leaves(config: HNetConfig) -> list[Leaf]:
    """All parameters of a configuration, without allocating them."""
    check_official(config)
    model, found = nnx.merge(*abstract(config)), []
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *modules, leaf_name = (str(part) for part in path)
        modules.append(_RENAMED.get(leaf_name, leaf_name))
        if is_stacked := "layers" in modules:
            at = modules.index("layers")
            run, stack = int(modules[at + 1]), model
            for part in path[:at]:
                stack = getattr(stack, str(part))
            first = sum(count for _, count in stack.runs[:run])
            layers = range(first, first + leaf.shape[0])
            names = [".".join([*modules[: at + 1], str(i), *modules[at + 2 :]]) for i in layers]
        else:
            names = [".".join(modules)]
        found.append(Leaf(path, names, is_stacked, leaf.shape, leaf.dtype))
    return found


def to_ours(path: tuple, array: np.ndarray) -> np.ndarray:
    if path[-1] == "conv1d_weight":
        return array[:, 0, :].T
    return array.T if path[-1] == "kernel" else array


def to_theirs(path: tuple, array: np.ndarray) -> np.ndarray:
    if path[-1] == "conv1d_weight":
        return array.T[:, None, :]
    return array.T if path[-1] == "kernel" else array


def official_shapes(config: HNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all entries of the official state dict."""
    shapes = {}
    for leaf in leaves(config):
        shape = to_theirs(leaf.path, np.broadcast_to(0, leaf.shape[leaf.is_stacked :])).shape
        shapes |= dict.fromkeys(leaf.names, shape)
    if config.tie_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    return shapes


def check_fit(config: HNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Mismatch if a name is missing, left over, or has the wrong shape."""
    expected = official_shapes(config)
    optional = {HEAD} if config.tie_embeddings else set()
    problems = [f"missing {n}" for n in sorted(set(expected) - optional - set(shapes))]
    problems += [f"left over {n}" for n in sorted(set(shapes) - set(expected))]
    problems += [
        f"{n} has shape {shapes[n]}, not {shape}"
        for n, shape in expected.items()
        if n in shapes and tuple(shapes[n]) != shape
    ]
    if problems:
        raise Mismatch(problems)


@partial(jax.jit, donate_argnums=0)
def _put(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), index, 0)


def assemble(
    config: HNetConfig,
    params: Mapping[str, np.ndarray],
    *,
    progress=lambda items: items,
    dtype_of=lambda path: jnp.float32,
) -> HNetLM:
    """Build the model from official entries; each entry is read once and then released.

    progress: wraps the list of leaves; dtype_of: path -> dtype of the parameter.
    """
    graph, state = nnx.split(nnx.merge(*abstract(config)))
    variables, filled = dict(nnx.to_flat_state(state)), {}
    for leaf in progress(leaves(config)):
        dtype = dtype_of(leaf.path)
        if leaf.is_stacked:
            value = jnp.zeros(leaf.shape, dtype)
            for i, name in enumerate(leaf.names):
                layer = np.ascontiguousarray(to_ours(leaf.path, params[name]))
                value = _put(value, layer, np.int32(i))
        else:
            value = jnp.array(to_ours(leaf.path, params[leaf.names[0]]), dtype)
        filled[leaf.path] = variables[leaf.path].replace(value)
    if config.tie_embeddings and HEAD in params:
        if not np.array_equal(params[HEAD], params[EMBEDDING]):
            raise Mismatch([f"{HEAD} differs from {EMBEDDING}, to which it is tied"])
    return nnx.merge(graph, nnx.from_flat_state(filled))


def from_official(config: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> HNetLM:
    """Build the model from an official configuration and state dict (official name -> array).

    Raises ConfigError, which lists the first such names, if a name is missing, left over, or has a
    shape that does not fit the configuration.
    """
    model_config = HNetConfig.from_json(dict(config))
    check_fit(model_config, {name: np.shape(array) for name, array in params.items()})
    return assemble(model_config, params)


def entries(
    config: HNetConfig, arrays: Iterable[tuple[Leaf, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Official (name, array) pairs of our parameters. A tied head is stored twice, as in the
    official code."""
    for leaf, array in arrays:
        layers = array if leaf.is_stacked else [array]
        for name, layer in zip(leaf.names, layers):
            # A contiguous copy, so that the parameter can be released.
            theirs = np.array(to_theirs(leaf.path, np.asarray(layer)), order="C")
            yield name, theirs
            if name == EMBEDDING and config.tie_embeddings:
                yield HEAD, theirs
        del array, layers, layer  # release before the next parameter is read


def to_official(model: HNetLM) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The official configuration and state dict of a model; inverse of `from_official`.

    Raises ConfigError for a model that has no official form.
    """
    check_runs(model.config)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    arrays = ((leaf, np.asarray(flat[leaf.path][...])) for leaf in leaves(model.config))
    return model.config.to_json(), dict(entries(model.config, arrays))
