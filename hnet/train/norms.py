"""Norms per part of a network, and the first of a step's tensors that is not finite."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hnet.checkpoint import leaves
from hnet.flops import part_of
from hnet.train.initial import name_of

LOSSES = ("loss/ce", "loss/total")
"""losses that are checked in every step; those of the stages are checked too"""


def norms(name: str, tree: Any, num_chunked: int) -> dict[str, jax.Array]:
    """`{"name/stage0/encoder": norm, ...}` of a tree of parameters, per part of the network.

    A part that has None for all of its parameters, because they are frozen, is left out.
    """
    parts: dict[str, list[jax.Array]] = {}
    for path, leaf in leaves.flatten(tree)[0].items():
        parts.setdefault(part_of(path.split("/"), num_chunked), []).append(leaf)
    return {f"{name}/{part}": optax.tree.norm(leaf_of) for part, leaf_of in sorted(parts.items())}


def watched(params: Any, num_chunked: int) -> list[str]:
    """Names of the tensors that `first_non_finite` checks, in its order.

    A fault spreads from parameters to losses to gradients, and among gradients from the last part
    of the network to the first one. In this order the origin comes first.
    """
    paths = list(leaves.flatten(params)[0])
    losses = [*(f"stage{s}/aux_loss" for s in range(num_chunked)), *LOSSES]
    backward = sorted(paths, key=lambda path: _from_the_end(path, num_chunked))
    return [_parameter(path) for path in paths] + losses + [_gradient(path) for path in backward]


def _parameter(path: str) -> str:
    return f"parameter {name_of(path)}"


def _gradient(path: str) -> str:
    return f"gradient {name_of(path)}"


def _from_the_end(path: str, num_chunked: int) -> tuple[float, float]:
    """Order in which the backward pass reaches the gradient of a parameter: part, then layer."""
    found = re.search(r"/layers/(\d+)\b", path)
    layer = -int(found[1]) if found else -math.inf
    part = part_of(path.split("/"), num_chunked)
    if not part.startswith("stage"):
        return (-1 if part == "lm_head" else math.inf), layer
    stage, _, module = part.removeprefix("stage").partition("/")
    match module:
        case "decoder" | "residual_proj" | "main_network":
            return int(stage), layer
        case "encoder":
            return 2 * num_chunked - int(stage) + 0.5, layer
        case _:  # between the encoder and the inner stage
            return 2 * num_chunked - int(stage), layer


def first_non_finite(
    params: Any, losses: Mapping[str, jax.Array], grads: Any, num_chunked: int
) -> jax.Array:
    """Index in `watched` of the first tensor with a NaN or an infinity; -1 if all are finite.

    grads: None for frozen parameters.
    """
    named = {_parameter(path): leaf for path, leaf in leaves.flatten(params)[0].items()}
    named |= losses
    named |= {_gradient(path): leaf for path, leaf in leaves.flatten(grads)[0].items()}
    is_finite = [
        jnp.all(jnp.isfinite(named[name])) if name in named else jnp.ones((), bool)
        for name in watched(params, num_chunked)
    ]
    bad = ~jnp.stack(is_finite)
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), -1)


def found_if(is_wanted: jax.Array, find: Callable[[], jax.Array]) -> jax.Array:
    """`find()` where wanted, else -1; nothing is computed for the latter.

    The scope tells `tpu.plan` not to count this, since few steps want it.
    """
    with jax.named_scope("rarely"):
        return jax.lax.cond(is_wanted, find, lambda: jnp.full((), -1, jnp.int32))
