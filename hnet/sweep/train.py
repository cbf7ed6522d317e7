"""Train points of one program: several runs together, a single run by itself."""

import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from hnet.errors import ConfigError
from hnet.printable import printable
from hnet.runtime.stop_request import StopRequest
from hnet.sweep.space import describe
from hnet.sweep.study import Claim, Study
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.lock import Locked
from hnet.train.loop import train
from hnet.train.metrics_file import MetricsFile, read_metrics
from hnet.train.observer import Observer
from hnet.train.parallel_runs import train_parallel_runs
from hnet.train.session import StopRun

SAY_SECONDS = 10.0  # between two progress lines of a group
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Options:
    """Options of this worker."""

    out: Path
    width: int
    timeout: float


def train_points(study: Study, claims: list[Claim], options: Options, stop: StopRequest) -> bool:
    """Train points of one program and write their results; False if asked to stop."""
    runs = [config for claim in claims for config in claim.point.runs]
    seeds = len(claims[0].point.runs)
    console.print(
        f"training {len(claims)} points x {seeds} seeds"
        + (" in one program" if len(runs) > 1 else "")
        + escape(f": {'; '.join(describe(claim.point.values) for claim in claims)}")
    )
    try:
        if len(runs) == 1:
            return _train_one(study, claims[0], options, stop)
        return _train_together(study, claims, options, stop)
    except Locked as e:  # a worker that counted as dead still trains these points
        study.release(claims)
        console.print(escape(printable(e)))
        time.sleep(options.timeout / 4)
        return True
    except (StopRun, ConfigError) as e:
        for claim in claims:
            study.fail(claim, str(e))
            console.print(escape(f"failed: {describe(claim.point.values)}: {printable(e)}"))
        return True
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        study.release(claims)
        raise ConfigError(
            f"width={options.width}: {len(runs)} runs in one program do not fit: lower it"
        ) from None


def _prune(study: Study, claims: list[Claim], step: int, bpb: list[float | None]) -> bool:
    """Report the points' bits per byte at a step; True if all points are pruned."""
    for claim, value in zip(claims, bpb):
        if value is not None:
            study.report(claim, step, value)
    for claim, value in zip(claims, bpb):
        if not claim.pruned and value is not None and study.should_prune(claim):
            claim.pruned = True
            said = f"pruned at step {step} with {value:.4f} bpb: {describe(claim.point.values)}"
            console.print(escape(said))
    return all(claim.pruned for claim in claims)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    return None if None in values else statistics.fmean(values)


def _train_together(study: Study, claims: list[Claim], options: Options, stop: StopRequest) -> bool:
    configs = [config for claim in claims for config in claim.point.runs]
    seeds = len(claims[0].point.runs)
    folder = options.out / "groups" / _digest([(c.point.group, c.point.key) for c in claims])
    own = [slice(i, i + seeds) for i in range(0, len(configs), seeds)]

    def watch(step: int, bpb: list[float | None]) -> bool:
        return _prune(study, claims, step, [_mean(bpb[part]) for part in own])

    show = _Progress(folder, configs[0].train.steps)
    outcome = train_parallel_runs(configs, str(folder), stop, watch=watch, show=show)
    ended = outcome.step == configs[0].train.steps or all(claim.pruned for claim in claims)
    if outcome.evaluations is None or not ended:
        return False
    curve = outcome.progress.curve
    for claim, part in zip(claims, own):
        faults = [f for r, f in outcome.progress.faults.items() if part.start <= int(r) < part.stop]
        if faults:
            study.fail(claim, faults[0])
            console.print(escape(f"failed: {describe(claim.point.values)}: {printable(faults[0])}"))
            continue
        runs = [
            _result(
                configs[r], outcome.evaluations[r], outcome.progress.overflow[r],
                [(step, values[r]) for step, values in curve], outcome.step,
            )
            for r in range(part.start, part.stop)
        ]  # fmt: skip
        _finish(study, claim, runs)
    return True


def _train_one(study: Study, claim: Claim, options: Options, stop: StopRequest) -> bool:
    name = f"{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', describe(claim.point.values))[:80]}"
    folder = options.out / "runs" / f"{name}-{_digest(claim.point.key)}"
    config = replace(claim.point.runs[0], workdir=str(folder))
    curve = [
        (row["step"], row["eval/bpb"])
        for row in read_metrics(folder)
        if "eval/bpb" in row and row["step"] < config.train.steps
    ]
    for step, bpb in curve:
        _prune(study, [claim], step, [bpb])
    ending = _Ending(stop)

    def watch(step: int, evaluation: Evaluation) -> None:
        if 0 < step < config.train.steps and step not in dict(curve):
            curve.append((step, evaluation.bpb if math.isfinite(evaluation.bpb) else None))
            ending.ended = _prune(study, [claim], step, [curve[-1][1]])

    outcome = train(config, ending, _Watch(watch))
    if outcome.evaluation is None and not claim.pruned:
        return False
    stages = range(config.model.num_chunked)
    rows = read_metrics(folder)
    overflow = [max((row[f"stage{s}/overflow_frac"] for row in rows), default=0.0) for s in stages]
    step = int(outcome.state.step)
    _finish(study, claim, [_result(config, outcome.evaluation, overflow, curve, step)])
    return True


@dataclass
class _Ending:
    """The stop request of one run: set if the worker has to stop or the run was pruned."""

    stop: StopRequest
    ended: bool = False

    def stop_requested(self, step: int) -> bool:
        return self.stop.stop_requested(step) or self.ended


@dataclass
class _Watch(Observer):
    """Passes the evaluations of a run to `watch`."""

    watch: Callable[[int, Evaluation], None]

    def evaluated(self, step, evaluation, seconds):
        self.watch(step, evaluation)


def _result(
    config: Config,
    evaluation: Evaluation | None,
    overflow: list[float],
    curve: list[tuple[int, float | None]],
    step: int,
) -> dict[str, Any]:
    """The record of a run in the storage. bytes_per_chunk and overflow are per stage."""
    stages = range(config.model.num_chunked) if evaluation else ()
    return {
        "seed": config.seed,
        "step": step,
        "bpb": evaluation.bpb if evaluation else curve[-1][1],
        "bytes_per_chunk": [evaluation.bytes_per_chunk(s) for s in stages],
        "overflow": overflow,
        "curve": curve,
    }


def _finish(study: Study, claim: Claim, runs: list[dict[str, Any]]) -> None:
    bpb = _mean([r["bpb"] for r in runs])
    if bpb is None or not math.isfinite(bpb):
        study.fail(claim, "the held-out bits per byte are not finite: lower the learning rate")
        console.print(escape(f"failed: {describe(claim.point.values)}"))
    elif not study.finish(claim, runs, None if claim.pruned else bpb):
        console.print(escape(f"another worker has done {describe(claim.point.values)} meanwhile"))
    elif not claim.pruned:
        console.print(escape(f"{bpb:.4f} bpb: {describe(claim.point.values)}"))


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=6).hexdigest()


class _Progress:
    """Writes metrics.jsonl of a group and prints its progress every ten seconds."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps, self.said = folder, steps, time.monotonic()
        self.file: MetricsFile | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = MetricsFile(self.folder, row["step"] - 1)
        self.file.write(row)
        if time.monotonic() - self.said > SAY_SECONDS:
            self.said = time.monotonic()
            best, pace = min(row["train/bpb"]), row["positions_per_sec"]
            console.print(
                f"step {row['step']}/{self.steps}  best {best:.3f} bpb  {pace:,.0f} positions/s"
            )
