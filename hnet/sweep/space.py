"""The space of a sweep: a TOML file that names fields of the configuration and their values.

sampler = "grid"          # grid, random or tpe (Optuna's Tree-structured Parzen Estimator)
trials = 32               # random and tpe: points
parallel = 4              # tpe: points that are drawn at once
pruner = "none"           # none, median or halving: stops points early by their bpb

[space]
optim.learning_rate = { low = 1e-4, high = 1e-2, log = true, num = 8 }   # num: for grid
model.stages.0.chunking.target_ratio = [4, 6]
seed = [0, 1]             # every point is trained with each seed; results are means over seeds
"""

import difflib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import optuna

from hnet.dotted import with_fields
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.outputs import read_file
from hnet.printable import printable
from hnet.train.compiled_run import untraced
from hnet.train.config import Config

MOST_RUNS = 100_000
"""largest number of runs of a sweep"""
Values = dict[str, Any]
"""field -> value, as JSON content"""


@dataclass(frozen=True)
class Range:
    """All numbers from low to high; integers if both are."""

    low: float
    high: float
    log: bool = False
    num: int = 0
    """number of grid values, including both ends; 0 = not given"""

    def grid(self) -> list[float]:
        """`num` values at equal distances, or at equal ratios if log."""
        share = [i / max(self.num - 1, 1) for i in range(self.num)]
        if self.log:
            found = [self.low * (self.high / self.low) ** x for x in share]
        else:
            found = [self.low + (self.high - self.low) * x for x in share]
        return list(dict.fromkeys(round(x) if self.is_whole else x for x in found))

    @property
    def is_whole(self) -> bool:
        return type(self.low) is int and type(self.high) is int

    def distribution(self) -> optuna.distributions.BaseDistribution:
        kinds = optuna.distributions
        kind = kinds.IntDistribution if self.is_whole else kinds.FloatDistribution
        return kind(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """Fields that a sweep varies and how its points are chosen."""

    choices: Mapping[str, Range | tuple]
    sampler: Literal["grid", "random", "tpe"] = "grid"
    trials: int = 0
    parallel: int = 4
    pruner: Literal["none", "median", "halving"] = "none"
    seeds: tuple[int, ...] = ()
    """seeds of every point; empty = the seed of the configuration"""

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {
            name: c.distribution()
            if isinstance(c, Range)
            else optuna.distributions.CategoricalDistribution([_plain(v) for v in c])
            for name, c in self.choices.items()
        }

    def values(self, params: Mapping[str, Any]) -> Values:
        """Optuna's parameters as JSON content of the fields."""
        return {
            name: params[name]
            if isinstance(c, Range)
            else next(v for v in c if _plain(v) == params[name])
            for name, c in self.choices.items()
        }

    def listed(self) -> list[Values] | None:
        """All points, in order; None if each depends on the results of others."""
        if self.sampler == "tpe":
            return None
        if self.sampler == "random":
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
            distributions = self.distributions()
            drawn = [self.values(study.ask(distributions).params) for _ in range(self.trials)]
            return list({point_key(values): values for values in drawn}.values())
        columns = [c.grid() if isinstance(c, Range) else c for c in self.choices.values()]
        return [dict(zip(self.choices, row)) for row in itertools.product(*columns)]


def _plain(value: Any) -> Any:
    """A choice as Optuna stores it: numbers and text as they are, the rest as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def point_key(values: Values) -> str:
    """Text that identifies a point: equal points give equal text."""
    return json.dumps({name: _plain(value) for name, value in sorted(values.items())})


def describe(values: Values) -> str:
    """`learning_rate=0.001, target_ratio=6`: last parts of the field names, short numbers."""
    last = [name.split(".")[-1] for name in values]
    names = [n if last.count(n) == 1 else name for n, name in zip(last, values)]
    shown = [f"{v:.4g}" if isinstance(v, float) else str(_plain(v)) for v in values.values()]
    pairs = (f"{name}={value}" for name, value in zip(names, shown))
    return printable(", ".join(pairs)) or "as configured"


@dataclass(frozen=True)
class Point:
    """One choice of values and its runs, one per seed."""

    values: Values
    runs: tuple[Config, ...]
    group: str = field(repr=False)
    """key that is equal for points whose runs share one program"""

    @property
    def key(self) -> str:
        return point_key(self.values)


def make_point(base: Config, space: Space, values: Values) -> Point:
    """The point of these values. Raises ConfigError, naming the point, if it is not valid."""
    seeds = space.seeds or (base.seed,)
    try:
        runs = tuple(with_fields(base, {**values, "seed": seed}) for seed in seeds)
        group = json.dumps(to_json(untraced(runs[0])), sort_keys=True)
        runs[0].optim.multipliers(runs[0].model)
    except ConfigError as e:
        where = f" (point {describe(values)})" if values else ""
        raise ConfigError(f"{e}{where}") from None
    return Point(values, runs, group)


def list_points(base: Config, space: Space) -> list[Point] | None:
    """All points, grouped by program; None if they are not known beforehand."""
    listed = space.listed()
    if listed is None:
        return None
    points = [make_point(base, space, values) for values in listed]
    first = {}
    for i, point in enumerate(points):
        first.setdefault(point.group, i)
    return sorted(points, key=lambda point: first[point.group])


def read_space(path: str, base: Config) -> Space:
    """Read a file and check it against the configuration that it varies. Raises ConfigError."""
    text = read_file(path, "space")
    try:
        content = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"space={path!r} is not TOML: {e}") from None
    settings = {f.name for f in fields(Space)} - {"choices", "seeds"}
    for name in content.keys() - settings - {"space"}:
        near = difflib.get_close_matches(name, [*settings, "space"], 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(settings))}"
        raise ConfigError(f"unknown setting {name!r} in {path}: {hint}; fields go under [space]")
    table = content.pop("space", None)
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"the space in {path} is empty: name at least one field under [space]")
    choices = dict(_choices(table, ""))
    seeds = choices.pop("seed", ())
    if isinstance(seeds, Range) or not all(type(s) is int and s >= 0 for s in seeds):
        raise ConfigError("space.seed: give a list of whole numbers from 0, e.g. [0, 1, 2]")
    if "workdir" in choices:
        raise ConfigError("space.workdir: every run gets its own; leave the field out")
    space = Space(choices=choices, seeds=tuple(seeds), **content)
    _check(space)
    first = {n: c.low if isinstance(c, Range) else c[0] for n, c in choices.items()}
    for name, value in first.items():  # names and types, before combinations are checked
        _check_field(base, name, value)
    return space


def _check_field(base: Config, name: str, value: Any) -> None:
    try:
        with_fields(base, {name: value})
    except ConfigError as e:
        if "unknown field" in str(e) or "expected" in str(e):
            raise ConfigError(f"space: {e}") from None


def _choices(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Range | tuple]]:
    """(dotted field, its values) for the fields in nested tables."""
    for name, value in table.items():
        where = f"{path}.{name}" if path else name
        match value:
            case {"low": _} | {"high": _}:
                yield where, _range(where, value)
            case dict():
                yield from _choices(value, where)
            case []:
                raise ConfigError(f"space.{where}=[]: give at least one value")
            case list():
                if len({json.dumps(v) for v in value}) < len(value):
                    raise ConfigError(f"space.{where}={value}: a value is there twice")
                yield where, tuple(value)
            case _:
                raise ConfigError(
                    f"space.{where}={value!r}: give a list of values or "
                    "{ low = ..., high = ..., log = true }"
                )


def _range(where: str, table: Mapping[str, Any]) -> Range:
    known = [f.name for f in fields(Range)]
    if bad := table.keys() - set(known):
        raise ConfigError(f"space.{where} has unknown {sorted(bad)}: a range has {known}")
    low, high = table.get("low"), table.get("high")
    log, num = table.get("log", False), table.get("num", 0)
    numbers = [v for v in (low, high) if type(v) in (int, float) and math.isfinite(v)]
    if len(numbers) < 2 or not low < high or (log and low <= 0):
        least = " above 0" if log else ""
        raise ConfigError(
            f"space.{where}: low={low!r} and high={high!r} are no range: use numbers{least}, "
            "low below high"
        )
    if type(log) is not bool or type(num) is not int or num < 0:
        raise ConfigError(f"space.{where}: log={log!r} is true or false, num={num!r} 1 or more")
    return Range(low, high, log, num)


def _check(space: Space) -> None:
    for name, known in (
        ("sampler", ("grid", "random", "tpe")),
        ("pruner", ("none", "median", "halving")),
    ):
        if getattr(space, name) not in known:
            raise ConfigError(f"{name}={getattr(space, name)!r}: use one of {', '.join(known)}")
    for name, least in (("trials", 0 if space.sampler == "grid" else 1), ("parallel", 1)):
        value = getattr(space, name)
        if type(value) is not int or value < least:
            raise ConfigError(
                f"{name}={value!r}: sampler={space.sampler!r} needs a whole number, {least} or more"
            )
    if space.sampler == "grid":
        sizes = [c.num if isinstance(c, Range) else len(c) for c in space.choices.values()]
        count, what = math.prod(sizes), f"the grid has {' x '.join(map(str, sizes))} points"
    else:
        count, what = space.trials, f"trials={space.trials}"
    if count * max(1, len(space.seeds)) > MOST_RUNS:
        raise ConfigError(f"{what}: use at most {MOST_RUNS:,} runs, seeds included")
    for name, c in space.choices.items():
        if space.sampler == "grid" and isinstance(c, Range) and not c.num:
            raise ConfigError(f"space.{name}: a grid needs num = how many, or a list of values")
