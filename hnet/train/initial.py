"""The weights that a new run starts from: copied by name from another checkpoint.

`plan` decides what is copied from where, from paths and shapes only; `replaced` reads the
arrays. Paths are those of a checkpoint, such as "backbone/encoder/rmsnorm/scale"; people write and
read names: "encoder.rmsnorm.scale".
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint import leaves
from hnet.errors import ConfigError
from hnet.nn.parameters import ParameterInfo, describe, set_frozen
from hnet.train.initial_weights import Shapes, Weights, open_weights
from hnet.train.sections import InitConfig

_BACKBONE = "backbone."


def name_of(path: str) -> str:
    """Name of a path: dots, and without the word backbone."""
    return path.replace("/", ".").removeprefix(_BACKBONE)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names this parameter, or a module that contains it."""
    full = path.replace("/", ".")
    names = {full, full.removeprefix(_BACKBONE)}
    return any(fnmatchcase(n, p) for n in names for p in (pattern, f"{pattern}.*"))


def matching(field: str, patterns: Sequence[str], paths: Iterable[str]) -> set[str]:
    """The paths that match a pattern. Raises ConfigError for a pattern that matches none."""
    paths, found = list(paths), set()
    for pattern in patterns:
        own = {path for path in paths if matches(pattern, path)}
        if not own:
            raise ConfigError(f"{field}={pattern!r} matches no parameter: {_near(pattern, paths)}")
        found |= own
    return found


def _near(name: str, paths: Iterable[str]) -> str:
    """Remedy for a name that no parameter has."""
    parts = [name_of(path).split(".") for path in paths]
    known = dict.fromkeys(".".join(own[:n]) for own in parts for n in range(1, len(own) + 1))
    if near := difflib.get_close_matches(name, known, 1):
        return f"did you mean {near[0]}?"
    return f"use one of {', '.join(dict.fromkeys(own[0] for own in parts))}, or a part of one"


class Plan(NamedTuple):
    """What a run starts from."""

    source: dict[str, str]
    """path of a parameter -> path of the one that it is copied from"""
    fresh: tuple[str, ...]
    """paths of parameters that keep their random initialisation"""


def plan(
    init: InitConfig, wanted: Shapes, infos: Mapping[str, ParameterInfo], saved: Shapes
) -> Plan:
    """The plan for parameters `wanted` from a checkpoint with the parameters `saved`.

    infos: metadata of `wanted`. Raises ConfigError, with all differences by name, if parameters of
    either side have no counterpart and are not in `init.map` or `init.new`.
    """
    fresh = matching("init.new", init.new, wanted) if init.new else set()
    mapped, gone = {}, {path for path in saved if any(matches(p, path) for p in init.new)}
    for pair in init.map:
        new, _, old = pair.partition("=")
        below_new, below_old = _below(pair, new, wanted), _below(pair, old, saved)
        if _is_stack(below_new) != _is_stack(below_old):
            below_new, below_old = _innermost(below_new), _innermost(below_old)
        gone |= set(below_old.values())
        mapped |= {path: below_old.get(rest) for rest, path in below_new.items()}
    source = {path: None if path in gone else path for path in wanted if path not in fresh}
    source |= {path: old for path, old in mapped.items() if path not in fresh}
    missing = [path for path, old in source.items() if old not in saved]
    copied = {path: old for path, old in source.items() if old in saved}
    other = [
        f"{name_of(path)} {saved[old]} there, {wanted[path]} here"
        for path, old in copied.items()
        if saved[old] != wanted[path]
        and not (path in mapped and _per_route(infos[path], wanted[path], saved[old]))
    ]
    left = [path for path in saved if path not in gone and path not in copied.values()]
    differences = {
        "missing there": collapsed(missing, wanted, left),
        "only there": collapsed(left, saved, missing),
        "of another shape": other,
    }
    if any(differences.values()):
        lists = [f"{kind}: {_few(own)}" for kind, own in differences.items() if own]
        raise ConfigError(
            f"init.from={init.from_!r} has another architecture; {'; '.join(lists)}: copy with "
            "--init.map NEW=OLD (routing_module=routing_module: one per route; =OLD omits OLD), "
            "or keep random values with --init.new PATTERN"
        )
    return Plan(copied, tuple(sorted(fresh)))


def _below(pair: str, prefix: str, shapes: Shapes) -> dict[str, str]:
    """Rest of the path -> path, for the parameters below a prefix; "" has none."""
    if not prefix:
        return {}
    for full in (prefix, _BACKBONE + prefix):
        start = full.replace(".", "/")
        below = {
            path.removeprefix(start): path for path in shapes if f"{path}/".startswith(f"{start}/")
        }
        if below:
            return below
    raise ConfigError(f"init.map={pair!r}: {prefix!r} is no parameter: {_near(prefix, shapes)}")


def _is_stack(below: dict[str, str]) -> bool:
    return any(rest.startswith("/layers/") for rest in below)


def _innermost(below: dict[str, str]) -> dict[str, str]:
    """The innermost main network of a stage, for a pair of a stage and a stack of layers."""
    inner = "/main_network"
    while found := {
        r.removeprefix(inner): p for r, p in below.items() if r.startswith(f"{inner}/")
    }:
        below = found
    return below


def _per_route(info: ParameterInfo, new: tuple[int, ...], old: tuple[int, ...]) -> bool:
    """Whether a parameter with a leading axis of routes can hold a copy of the old one for each."""
    return (info.per_script and new[1:] == old) or (info.axes == ("script",) and old == (1,))


def collapsed(some: Iterable[str], every: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names of `some` of the paths; a module is one name if all its parameters are among them, and
    none are among the `others`."""
    some, found = set(some), {}
    kept = [f"{path}/" for path in (set(every) - some) | set(others)]
    for path in sorted(some):
        parts = path.split("/")
        modules = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
        whole = (m for m in modules if not any(k.startswith(f"{m}/") for k in kept))
        found[name_of(next(whole, path))] = None
    return list(found)


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def frozen_graph(init: InitConfig, graph: Any, params: Any) -> Any:
    """`graph` in which the parameters that `init.freeze` matches are marked as frozen.

    params: parameters of the graph, or their shapes.
    """
    if not init.freeze:
        return graph
    paths = list(leaves.flatten(params)[0])
    frozen = matching("init.freeze", init.freeze, paths)
    if len(frozen) == len(paths):
        raise ConfigError(f"init.freeze={init.freeze}: nothing is left to train")
    model = nnx.merge(graph, params)
    set_frozen(model, frozen.__contains__)
    return nnx.split(model)[0]


class Started(NamedTuple):
    """A plan, with what it needs to be carried out."""

    plan: Plan
    weights: Weights
    infos: Mapping[str, ParameterInfo]


def open_start(
    init: InitConfig, graph: Any, abstract_params: Any, *, runs: bool = False
) -> Started:
    """Open the weights and plan the start; nothing is read yet. Raises ConfigError.

    abstract_params: shapes and shardings of the parameters; with `runs` they have a leading axis of
    runs, which all start from the same weights.
    """
    infos = leaves.flatten(describe(nnx.merge(graph, abstract_params)))[0]
    wanted = {path: leaf.shape[runs:] for path, leaf in leaves.flatten(abstract_params)[0].items()}
    weights = open_weights(init.from_, init.ema)
    return Started(plan(init, wanted, infos, weights.shapes), weights, infos)


def replaced(params: Any, start: Started) -> Any:
    """`params` in which all but the fresh parameters are those of the weights, with the same
    shardings and dtypes."""
    named, treedef = leaves.flatten(params)
    users: dict[str, list[str]] = {}
    for path, old in start.plan.source.items():
        users.setdefault(old, []).append(path)

    def sharding(old: str) -> jax.sharding.Sharding:
        like = named[users[old][0]]
        is_same = like.shape == start.weights.shapes[old]
        return like.sharding if is_same else NamedSharding(like.sharding.mesh, P())

    for old, array in start.weights.read({old: sharding(old) for old in users}):
        for path in users[old]:
            named[path] = _placed(array, named[path])
    return jax.tree.unflatten(treedef, list(named.values()))


def _placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """A copy of the array in the shape, dtype and sharding of `like`."""

    def copy(x):
        return jnp.copy(jnp.broadcast_to(x.astype(like.dtype), like.shape))

    return jax.jit(copy, out_shardings=like.sharding)(array)


def table(graph: Any, params: Any, start: Started | None = None) -> list[str]:
    """Lines that name, for each module, its parameters, what they start from, and if they train.

    start: None for a run that is resumed, or starts from random parameters.
    """
    infos = leaves.flatten(describe(nnx.merge(graph, params)))[0]
    rows: dict[tuple[str, str, str], int] = {}
    for path, leaf in leaves.flatten(params)[0].items():
        origin = "" if start is None else "random"
        if start and path in start.plan.source:
            origin = module_of(start.plan.source[path])
        trains = "frozen" if infos[path].frozen else "trained"
        key = module_of(path), origin, trains
        rows[key] = rows.get(key, 0) + leaf.size
    lines = [f"  {m:<28}{n:>14,}  {t:<9}{o}" for (m, o, t), n in sorted(rows.items())]
    total = sum(rows.values())
    frozen = sum(n for key, n in rows.items() if key[2] == "frozen")
    head = f"starts from {start.weights.name}: " if start else ""
    return [f"{head}{total:,} parameters, {frozen:,} of them frozen", *lines]


def module_of(path: str) -> str:
    """Name of the part of a stage that a parameter belongs to."""
    parts, n = name_of(path).split("."), 0
    while n < len(parts) - 1 and parts[n] == "main_network":
        n += 1
    return ".".join(parts[: n if n and parts[n] in ("layers", "rmsnorm") else n + 1])
