"""The configuration of a run, and checks across its sections."""

from dataclasses import dataclass, field
from typing import Any

from hnet.chunking.upgrade import up_to_date
from hnet.config import HNetConfig
from hnet.data.scripts import route_table
from hnet.errors import ConfigError
from hnet.fields import check, from_json
from hnet.train.sections import (
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    InitConfig,
    MeshConfig,
    OptimConfig,
    ProfileConfig,
    RateControlConfig,
    Sections,
    TrackerConfig,
    TrainConfig,
    WatchdogConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "RateControlConfig",
    "DistributedConfig",
    "EvalConfig",
    "InitConfig",
    "MeshConfig",
    "OptimConfig",
    "ProfileConfig",
    "TrackerConfig",
    "TrainConfig",
    "WatchdogConfig",
    "config_from_json",
]


@dataclass(frozen=True)
class Config(Sections):
    """All settings of a run."""

    model: HNetConfig = field(kw_only=True)

    def __post_init__(self):
        check(self)
        route_table(self.model.route_groups, "model.route_groups")
        if self.model.num_routes > 1 and not self.model.route_groups:
            raise ConfigError(
                f"model.route_groups=() names no scripts, but the stages tell "
                f"{self.model.num_routes} routes apart: give {self.model.num_routes - 1} groups"
            )
        if self.eval.ema and not self.optim.ema_decay:
            raise ConfigError("eval.ema=True, but optim.ema_decay=0.0 keeps no average: set it")
        ratios, chunked = self.rate_control.start_ratios, self.model.num_chunked
        if ratios and len(ratios) != chunked:
            raise ConfigError(
                f"rate_control.start_ratios={ratios} has {len(ratios)} numbers for {chunked} "
                "stages that chunk: give one each"
            )
        if problem := self.model.embedding.training_problem(self.data):
            raise ConfigError(f"model.embedding.{problem}")
        cuts = [stage.chunking for stage in self.model.stages[:-1]]
        if self.rate_control.fit_default and not any(
            cut.hold_rate and cut.num_predictors > 1 for cut in cuts
        ):
            raise ConfigError(
                "rate_control.fit_default=True, but no stage has a router for each route and holds "
                "their rates: set chunking.routes and hold_rate of one, or use False"
            )
        for i, cut in enumerate(cuts):
            found = (part.training_problem(self.data) for part in cut.parts.values())
            if problem := next(filter(None, found), None):
                raise ConfigError(f"model.stages.{i}.chunking: {problem}")
            if i and self.train.rows_sharing_slots > 1 and cut.loss_by_row:
                raise ConfigError(
                    f"train.rows_sharing_slots={self.train.rows_sharing_slots}, but the loss "
                    f"{cut.loss_by_row!r} of stage {i} is taken row by row: use 1, or "
                    f"model.stages.{i}.chunking.losses ratio"
                )


def config_from_json(content: Any) -> Config:
    """A run's configuration from JSON content of this or an earlier version.

    Raises ConfigError like `hnet.fields.from_json`.
    """
    return from_json(Config, _up_to_date(content))


def _up_to_date(content: Any) -> Any:
    """JSON content of an earlier version, converted to the current fields."""
    for path, name in Sections.renamed.items():
        node, last = _parent(content, path)
        if isinstance(node, dict) and last in node:
            node.setdefault(name, node.pop(last))
    node, last = _parent(content, "data.unknown_script_frac")
    if isinstance(node, dict) and last in node and node[last] in (0,):
        node.pop(last)  # it had no effect at 0
    up_to_date(content.get("model") if isinstance(content, dict) else None)
    return content


def _parent(content: Any, path: str) -> tuple[Any, str]:
    """What holds the last name of a dotted path (None if it does not exist), and that name."""
    *outer, last = path.split(".")
    for name in outer:
        content = content.get(name) if isinstance(content, dict) else None
    return content, last
