"""Train the seeds of one system, together in one program where that is possible."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from experiments.compare.systems import System
from hnet.checkpoint.save import Checkpointer
from hnet.data import Corpus
from hnet.fields import to_json
from hnet.runtime.stop_request import StopRequest
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.loop import train
from hnet.train.metrics_file import MetricsFile, read_metrics
from hnet.train.parallel_runs import Outcome, train_parallel_runs
from hnet.train.run_state import RunState
from hnet.train.session import StopRun
from hnet.train.workdir import claim_workdir, run_inputs

TOGETHER = "together"  # folder of the program that trains several seeds

Record = dict[str, Any]


def train_system(
    system: System, folder: Path, seeds: Sequence[int], corpus: Corpus, stop: StopRequest
) -> dict[int, Record] | None:
    """Train up to the last step and write a work directory per seed; None if asked to stop.

    Returns what only training knows, by seed. Resumes from the checkpoints in `folder`. Raises
    StopRun if all seeds fail; a seed that fails has no record.
    """
    runs = [system.run(folder, seed) for seed in seeds]
    if len(runs) > 1 and _fits(system.config):
        try:
            return _together(system, runs, folder, corpus, stop)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
    found, faults = {}, []
    for run in runs:
        try:
            outcome = train(run, stop)
        except StopRun as e:
            faults.append(str(e))
            continue
        if outcome.evaluation is None:
            return None
        rows = read_metrics(run.workdir)
        stages = range(run.model.num_chunked)
        overflow = [max((r.get(f"stage{s}/overflow_frac", 0) for r in rows), default=0)
                    for s in stages]  # fmt: skip
        speeds = [row["bytes_per_sec"] for row in rows[1:] if "bytes_per_sec" in row]
        found[run.seed] = _record(outcome.evaluation, overflow, speeds)
    if faults and not found:
        raise StopRun(faults[0])
    return found


def _fits(config: Config) -> bool:
    """Whether several runs can be one program: each is on one device there."""
    return config.mesh.fsdp == config.mesh.tensor == 1 and jax.process_count() == 1


def _together(
    system: System, runs: Sequence[Config], folder: Path, corpus: Corpus, stop: StopRequest
) -> dict[int, Record] | None:
    together, log = folder / TOGETHER, None

    def show(row: dict[str, Any]) -> None:
        nonlocal log
        log = log or MetricsFile(together, row["step"] - 1)
        log.write(row)

    outcome = train_parallel_runs(runs, str(together), stop, show=show)
    if outcome.evaluations is None:
        return None
    rows = read_metrics(together)[1:]  # the first one waits for compilation
    speeds = [row["positions_per_sec"] * system.bytes_per_position for row in rows]
    found = {}
    for r, run in enumerate(runs):
        if str(r) in outcome.progress.faults:
            continue
        _write_run(run, outcome, r, corpus)
        record = _record(outcome.evaluations[r], outcome.progress.overflow[r], speeds)
        found[run.seed] = record
    if not found:
        raise StopRun(next(iter(outcome.progress.faults.values())))
    return found


def _write_run(run: Config, outcome: Outcome, r: int, corpus: Corpus) -> None:
    """A work directory of run r of a program, as if it had been trained by itself."""
    state = jax.tree.map(lambda leaf: leaf[r], outcome.state)
    done = outcome.step
    position = RunState(data=done, settled=done, evaluated=done)
    claim_workdir(run, run_inputs(run, corpus))
    once = replace(run.checkpoint, asynchronous=False)
    with Checkpointer(run.workdir, once) as checkpoints:
        checkpoints.save(done, state, {"position": asdict(position), "config": to_json(run)})


def _record(evaluation: Evaluation, overflow: Sequence[float], speeds: Sequence[float]) -> Record:
    stages = range(len(evaluation.chunks_by_stage))
    return {
        "bpb": evaluation.bpb,
        "heldout_bytes": evaluation.num_bytes,
        "bytes_per_chunk": [evaluation.bytes_per_chunk(s) for s in stages],
        "overflow": [float(lost) for lost in overflow],
        "train_bytes_per_sec": statistics.median(speeds) if speeds else None,
    }
