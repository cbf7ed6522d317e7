"""What a run has at hand while it trains, and what it returns."""

from dataclasses import dataclass
from typing import Any

from hnet.checkpoint.save import Checkpointer
from hnet.data import Corpus
from hnet.errors import Failed
from hnet.runtime.stop_request import StopRequest
from hnet.train.compiled_run import CompiledRun
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.run_logger import RunLogger
from hnet.train.step import TrainState
from hnet.train.watchdog import Watchdog


class StopRun(Failed):
    """Training failed; the message is one line with the fault and a remedy."""


@dataclass
class InFlight:
    """A dispatched step; its metrics are read while the next step runs."""

    step: int
    metrics: dict[str, Any]
    capacities: tuple[int, ...]
    batch: int
    """number of its batch"""


@dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    state: TrainState
    evaluation: Evaluation | None
    """evaluation on the whole held-out text; None if the run was stopped before its end"""
    program: CompiledRun
    corpus: Corpus


@dataclass(frozen=True)
class Session:
    """Objects that one process uses from the first step to the last."""

    config: Config
    corpus: Corpus
    program: CompiledRun
    checkpoints: Checkpointer
    report: RunLogger
    watchdog: Watchdog
    stop: StopRequest


class NonFinite(RuntimeError):
    """Loss or gradient was not finite for train.max_skipped updates in a row."""

    def __init__(self, skipped: int, step: int, tensor: str = ""):
        first = f", first in {tensor}" if tensor else ""
        super().__init__(
            f"non-finite loss or gradient in {skipped} updates in a row up to {step}{first}"
        )
        self.good_step = step - skipped
        """number of updates before the first skipped one"""
