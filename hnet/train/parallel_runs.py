"""Many runs as one program: their states stacked on a leading axis, sharded over the devices.

`program.experiment` defines one run; here it is mapped over R runs that differ only in traced
numbers and seeds. Each run sees the batches of its own seed, as if trained separately. All runs
use the capacities that the run with most chunks needs. This changes no result as long as no chunk
is clipped.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint.save import Checkpointer, Restored
from hnet.checkpoint.step_folders import work_folder
from hnet.data import Corpus, identity, open_corpus, train_batches
from hnet.data.pipeline import Batch
from hnet.errors import Failed
from hnet.loss import bits_per_byte
from hnet.runtime.stop_request import StopRequest
from hnet.train.compiled_run import (
    CompiledRun,
    run_evaluation,
)
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation, OfEachRun
from hnet.train.exact_offsets import set_exact_offsets
from hnet.train.initial import open_start, replaced
from hnet.train.lock import DirectoryLock
from hnet.train.parallel_program import build, put_batches
from hnet.train.run_logger import RunLogger, Start
from hnet.train.step import with_params
from hnet.train.workdir import check_steps


@dataclass
class RunStates:
    """State of the runs besides their arrays; plain JSON in every checkpoint."""

    curve: list[tuple[int, list[float | None]]] = field(default_factory=list)
    """evaluations before the last: (step, held-out bits per byte of each run, None for NaN)"""
    overflow: list[list[float]] = field(default_factory=list)
    """largest fraction of chunks clipped in one step, by run and stage"""
    faults: dict[str, str] = field(default_factory=dict)
    """fault of each failed run, by number of the run"""
    ladder: dict = field(default_factory=dict)
    settled: int = 0
    """step whose parameters got exact boundary offsets"""


@dataclass(frozen=True)
class Outcome:
    """Result of the runs."""

    state: Any
    step: int
    evaluations: tuple[Evaluation, ...] | None
    """last evaluation of each run; None if the runs were stopped by a request"""
    progress: RunStates


Watch = Callable[[int, list[float | None]], bool]
"""callback for (step, bpb), an entry of `RunStates.curve`; if it returns True all runs end"""
Show = Callable[[dict[str, Any]], None]
"""callback for one row per `train.log_every` steps: step, train/bpb of each run and
positions_per_sec"""


def train_parallel_runs(
    configs: Sequence[Config],
    workdir: str,
    stop: StopRequest,
    *,
    watch: Watch = lambda step, bpb: False,
    show: Show = lambda row: None,
) -> Outcome:
    """Train the runs up to `train.steps`, from the newest good checkpoint of `workdir` if any.

    A run with `train.max_skipped` skipped updates in a row (non-finite loss or gradient) counts as
    failed (`RunStates.faults`); the other runs continue. Raises ConfigError for settings that
    cannot work.
    """
    corpus, config = open_corpus(configs[0].data), configs[0]
    read = identity.inputs(config.data, corpus)
    program = build(configs)
    RunLogger(config, corpus, Start())  # raises for what a run by itself is refused for
    with DirectoryLock(workdir), Checkpointer(workdir, config.checkpoint) as checkpoints:
        before = identity.read_inputs(work_folder(workdir))
        identity.check_inputs(
            before, read, f"the runs in {workdir}", "give them the same content, or another folder"
        )
        start = None
        if config.init.from_ and not checkpoints.steps():
            graph, params = program.graph, program.abstract_state.params
            start = open_start(config.init, graph, params, runs=True)
        state, progress, done = program.init(), RunStates(), 0
        if start:
            state = with_params(state, replaced(state.params, start))
        progress.overflow = [[0.0] * config.model.num_chunked for _ in configs]
        if checkpoints.steps():
            restored = _restored(checkpoints, program, len(configs))
            state, done = restored.state, restored.step
            progress = RunStates(**restored.extras["progress"])
        check_steps(config, workdir, done)
        if before is None:
            _write_inputs(workdir, read)
        for step, bpb in progress.curve:
            watch(step, bpb)
        with open_batches(configs, corpus, done) as batches:
            runs = _Runs(configs, corpus, program, checkpoints, stop, watch, show, batches)
            return runs.train(state, progress, done)


def _restored(checkpoints: Checkpointer, program: CompiledRun, count: int) -> Restored:
    """The newest good state of `count` runs. It may be padded for another number of devices."""
    wanted = program.abstract_state
    step = checkpoints.latest_good_step()
    leaves = checkpoints.manifest(step).leaves if step is not None else {}
    saved = next((leaf["shape"][0] for leaf in leaves.values()), program.mesh.shape["runs"])
    if saved == wanted.step.shape[0] or saved < count:
        return checkpoints.restore(wanted)
    everywhere = NamedSharding(program.mesh, P())
    padded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((saved, *x.shape[1:]), x.dtype, sharding=everywhere), wanted
    )
    restored = checkpoints.restore(padded)
    runs = np.minimum(np.arange(wanted.step.shape[0]), count - 1)
    take = jax.jit(lambda state: jax.tree.map(lambda x: x[runs], state),
                   out_shardings=program.shardings)  # fmt: skip
    return restored._replace(state=take(restored.state))


def _write_inputs(workdir: str, read: identity.Inputs) -> None:
    try:
        identity.write_inputs(work_folder(workdir), read)
    except OSError as e:
        raise Failed(f"workdir={workdir} cannot be written to ({e.strerror})") from None


@contextlib.contextmanager
def open_batches(configs: Sequence[Config], corpus: Corpus, start: int):
    """An iterator over lists of batches, one per run; runs with equal seeds share a batch."""
    groups = configs[0].model.route_groups
    with contextlib.ExitStack() as stack:
        by_seed = {
            seed: stack.enter_context(
                train_batches(corpus, configs[0].data, seed=seed, start=start, route_groups=groups)
            )
            for seed in dict.fromkeys(c.seed for c in configs)
        }

        def together() -> Iterator[list[Batch]]:
            while True:
                batch = {seed: next(batches) for seed, batches in by_seed.items()}
                yield [batch[c.seed] for c in configs]

        yield together()


@dataclass
class _Runs:
    """Objects that `train` uses from the first step to the last."""

    configs: Sequence[Config]
    corpus: Corpus
    program: CompiledRun
    checkpoints: Checkpointer
    stop: StopRequest
    watch: Watch
    show: Show
    batches: Iterator[list[Batch]]

    def train(self, state: Any, progress: RunStates, done: int) -> Outcome:
        """Train in the order of `hnet.train.loop`: evaluate, save, next batch, step, read."""
        config, start, self.shown = self.configs[0], done, (time.monotonic(), done)
        ladder = self.program.ladder
        if progress.ladder:
            ladder = ladder.with_json(progress.ladder)
        inflight: tuple[int, dict] | None = None
        while True:
            last, ends, evaluations = done == config.train.steps, False, None
            if last and progress.settled != done:
                exact = partial(
                    set_exact_offsets, self.program, corpus=self.corpus, configs=self.configs,
                    capacities=ladder.capacities,
                )  # fmt: skip
                ema = exact(state.ema) if state.ema else state.ema
                state = state._replace(params=exact(state.params), ema=ema)
                progress.settled = done
            if last or (_due(done, config.eval.every) and done not in dict(progress.curve)):
                shown = state.ema if self.configs[0].eval.ema else state.params
                evaluations = self._evaluate(shown, ladder.capacities, done, whole=last)
            if evaluations and not last:
                bpb = [e.bpb if math.isfinite(e.bpb) else None for e in evaluations]
                progress.curve.append((done, bpb))
                ends = self.watch(done, bpb)
            stopping = self.stop.stop_requested(done)
            saves = stopping or last or ends or _due(done, config.checkpoint.every)
            if saves and done > start:
                if inflight:
                    ladder, inflight = ladder.observe(self._read(inflight, progress)), None
                progress.ladder = ladder.to_json()
                self.checkpoints.save(done, state, {"progress": asdict(progress)})
            if last or stopping or ends:
                self.checkpoints.wait()
                return Outcome(state, done, evaluations, progress)

            batch = put_batches(next(self.batches), self.program.mesh)
            state, metrics = self.program.step(
                state, batch, self.program.hparams, capacities=ladder.capacities
            )
            done += 1
            if inflight:
                ladder = ladder.observe(self._read(inflight, progress))
            inflight = done, metrics
            self.checkpoints.check()

    def _evaluate(self, params, capacities, done: int, *, whole: bool):
        """One Evaluation per run; None if a stop was requested."""
        config = self.configs[0]
        return run_evaluation(
            self.program, params, self.corpus.heldout, config, capacities,
            max_bytes=None if whole else config.eval.max_bytes,
            should_stop=lambda: self.stop.stop_requested(done),
            into=OfEachRun(
                Evaluation(route_names=config.model.route_names) for _ in self.configs
            ),
        )  # fmt: skip

    def _read(self, inflight: tuple[int, dict], progress: RunStates) -> tuple[int, ...]:
        """Wait for a step and record it; returns the most slots that a row of any run needed."""
        step, metrics = inflight[0], jax.device_get(inflight[1])
        config, bpb = self.configs[0], []
        stages = range(config.model.num_chunked)
        for r in range(len(self.configs)):
            bpb.append(bits_per_byte(float(metrics["nats"][r]), int(metrics["bytes"][r])))
            for s in stages:
                lost = float(metrics[f"stage{s}/overflow_frac"][r])
                progress.overflow[r][s] = max(progress.overflow[r][s], lost)
            if metrics["skipped_in_a_row"][r] >= config.train.max_skipped:
                many = f"{config.train.max_skipped} updates in a row up to step {step}"
                first = self.program.watched[int(metrics["first_non_finite"][r])]
                fault = f"non-finite loss or gradient in {many}, first in {first}"
                progress.faults.setdefault(str(r), fault)
        if step == 1 or step % config.train.log_every == 0:
            before, self.shown = self.shown, (time.monotonic(), step)
            pace = (step - before[1]) / max(self.shown[0] - before[0], 1e-9)
            positions = len(self.configs) * config.data.batch_size * config.data.seq_len
            row = {"step": step, "train/bpb": bpb, "positions_per_sec": pace * positions}
            self.show(row)
        return tuple(int(metrics[f"stage{s}/max_slots"].max()) for s in stages)


def _due(done: int, every: int) -> bool:
    return bool(every) and done > 0 and done % every == 0
