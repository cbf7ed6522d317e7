"""The configuration of a run: one dataclass whose sections live beside the code that reads them."""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hnet.chunking.controller import ControllerConfig
from hnet.config import HNetConfig
from hnet.data.config import DataConfig
from hnet.data.scripts import route_table
from hnet.errors import ConfigError
from hnet.train.checkpoint import CheckpointConfig
from hnet.train.distributed import DistributedConfig
from hnet.train.optim import OptimConfig
from hnet.train.sharding import MeshConfig
from hnet.train.step_folders import work_folder
from hnet.train.watchdog import WatchdogConfig


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what happens when numbers go wrong."""

    steps: int = 1000
    """optimizer updates"""
    accumulate: int = 1
    """micro-batches an update; the batch is cut into that many"""
    packed_rows: int = 1
    """rows of a device whose chunks share a row of slots, so that one that cuts often takes what
    another leaves; as many of them as divide the rows of a device"""
    log_every: int = 10
    """updates between two lines of metrics.jsonl"""
    max_skipped: int = 10
    """updates in a row that may be skipped for a non-finite loss or gradient"""
    on_non_finite: Literal["rollback", "stop"] = "rollback"
    """after max_skipped: go back to the last good checkpoint with later data, or end"""
    stop_on_alarm: bool = False
    """end the run when a boundary alarm is raised"""

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("accumulate", 1),
            ("packed_rows", 1),
            ("log_every", 1),
            ("max_skipped", 1),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"train.{name}={value}: use {least} or more")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out text while training."""

    every: int = 500
    """updates between two evaluations; there is one at the start and one at the end"""
    max_bytes: int = 65_536
    """held-out bytes of the evaluations before the last one, which reads all"""
    probe_bytes: int = 384
    """bytes of each text whose boundaries are drawn"""
    probe_texts: int = 4
    """texts drawn of the held-out text and of each of probe_files, spread evenly"""
    probe_files: tuple[str, ...] = ()
    """files of texts with gold boundaries, as `experiments.boundaries` reads them"""

    def __post_init__(self):
        for name, least in (("probe_bytes", 1), ("probe_texts", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"eval.{name}={value}: use {least} or more")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace for TensorBoard's profile plugin."""

    steps: str = ""
    """FIRST:LAST, e.g. 10:20; empty = no trace"""


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    model: HNetConfig
    workdir: str
    """folder of this run, local or gs://bucket/folder; the same command again resumes in it"""
    seed: int = 0
    """of the initialisation and the order of the data"""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    controller: ControllerConfig = ControllerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        route_table(self.model.route_groups, "model.route_groups")
        if self.model.num_routes > 1 and not self.model.route_groups:
            raise ConfigError(
                f"model.route_groups=() names no scripts, but the stages tell "
                f"{self.model.num_routes} routes apart: give {self.model.num_routes - 1} groups"
            )
        cuts = [stage.chunking for stage in self.model.stages[:-1]]
        if self.controller.fit_default and not any(
            cut.hold_rate and cut.num_predictors > 1 for cut in cuts
        ):
            raise ConfigError(
                "controller.fit_default=True, but no stage has a router for each route and holds "
                "their rates: set chunking.routes and hold_rate of one, or use False"
            )
        by_row = [
            i
            for i, stage in enumerate(self.model.stages[1:-1], 1)
            if stage.chunking.aux_loss_is_by_row
        ]
        if by_row and self.train.packed_rows > 1:
            raise ConfigError(
                f"train.packed_rows={self.train.packed_rows}, but the rate loss of stage "
                f"{by_row[0]} is taken row by row: use 1, or "
                f"model.stages.{by_row[0]}.chunking.aux_loss='ratio'"
            )


# Fields of earlier versions that are read and left out: one that says what the mesh says, and one
# whose 0 changed nothing.
_GONE = {"model.compute.batch_shards": range(1, 2**20), "data.unknown_script_frac": (0,)}


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON content."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type, content: Any, path: str = "") -> Any:
    """The dataclass `cls` from JSON content; a missing field takes its default.

    Raises ConfigError, naming the field, for an unknown one or a value of another type.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{path or 'configuration'}={content!r}: expected an object")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    content = {k: v for k, v in content.items() if v not in _GONE.get(_join(path, k), ())}
    for name in content:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(f"unknown field {_join(path, name)}: {hint}")
    values = {k: _value(hints[k], v, _join(path, k)) for k, v in content.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"field {_join(path, name)} is missing")
    return cls(**values)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values, as JSON content, of some fields by dotted path.

    Raises ConfigError, naming the field, for an unknown one or a value that cannot be.
    """
    content = to_json(config)
    for path, value in values.items():
        node, name = content, ""
        for part in path.split("."):
            parent, node, name = node, None, _join(name, part)
            known = list(parent) if isinstance(parent, dict) else []
            if isinstance(parent, list):
                known = [str(i) for i in range(len(parent))]
            if part not in known:
                near = difflib.get_close_matches(part, known, 1) or known
                hint = f"did you mean {' or '.join(near)}?" if near else "it has no fields"
                raise ConfigError(f"unknown field {name}: {hint}")
            part = int(part) if isinstance(parent, list) else part
            node = parent[part]
        parent[part] = value
    return from_json(Config, content)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _value(option, value, path)
            except ConfigError:
                continue
    elif origin is Literal and value in args:
        return value
    elif origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(kinds, value)))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is type(None) and value is None or hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{path}={value!r}: expected {getattr(hint, '__name__', hint)}")


def read_config(workdir: str | os.PathLike) -> Config:
    """The configuration a run was started with. Raises ConfigError if there is none."""
    return from_json(Config, _up_to_date(_stored(workdir)))


def _up_to_date(content: Any) -> Any:
    """What an earlier version wrote, in today's fields: a model is what it was trained to be."""
    if isinstance(content, dict):
        if isinstance(data := content.get("data"), dict):
            data.pop("unknown_script_frac", None)
        if isinstance(controller := content.get("controller"), dict):
            controller.setdefault("hold_frac", 1.0)
    return content


def _stored(workdir: str | os.PathLike) -> Any:
    file = work_folder(workdir) / "config.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: give the work directory of a run") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from None


# What may not change between two starts in the same work directory: the parameters and which bytes
# batch k holds depend on it.
_FIXED = ("model", "data", "seed")


def claim_workdir(config: Config) -> None:
    """Write config.json, or check that the run there is this one.

    Raises ConfigError naming the first field that differs in a way that makes it another run. A
    changed setting of the rest is allowed; the former file is kept as config-N.json.
    """
    folder = work_folder(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file, content = folder / "config.json", to_json(config)
    if file.exists():
        before = to_json(read_config(folder))
        if gone := _stored(folder).get("data", {}).get("unknown_script_frac"):
            raise ConfigError(
                f"the run in workdir={config.workdir} has data.unknown_script_frac={gone!r}, which "
                "is not trained with any more: use another workdir to start anew"
            )
        if before == content:
            return
        for path, old, new in differences(before, content):
            if path.split(".")[0] in _FIXED and not path.startswith("model.compute"):
                raise ConfigError(
                    f"{path}={new!r}, but the run in workdir={config.workdir} has {old!r}: "
                    "use that value to resume it, or another workdir"
                )
        n = 1
        while (folder / f"config-{n}.json").exists():
            n += 1
        file.rename(folder / f"config-{n}.json")
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(file)


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) wherever two contents of JSON differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), _join(path, key))
    elif a != b:
        yield path, a, b
