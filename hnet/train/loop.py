"""The training loop, in fixed order: evaluate, save, next batch, step, read the last metrics."""

import contextlib
import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax

from hnet.checkpoint.save import Checkpointer
from hnet.data import BatchIterator, Corpus, open_corpus, train_batches
from hnet.data.fingerprint import fingerprint
from hnet.decode.segment import segmenter
from hnet.fields import to_json
from hnet.runtime import distributed
from hnet.runtime.stop_request import StopRequest
from hnet.train.capacity import CapacitySchedule
from hnet.train.compiled_run import Change, build, put_batch, run_evaluation
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.exact_offsets import set_exact_offsets
from hnet.train.first_lines import first_lines
from hnet.train.observer import Observer
from hnet.train.run_logger import RunLogger, Start
from hnet.train.run_state import RunState, first_state, restored
from hnet.train.session import InFlight, NonFinite, Outcome, Session, StopRun
from hnet.train.sharding import replicated
from hnet.train.step import TrainState
from hnet.train.utilization import Utilization, peak_of
from hnet.train.watchdog import Watchdog
from hnet.train.workdir import (
    check_steps,
    check_workdir,
    claim_workdir,
    locked_workdir,
    run_inputs,
)

log = logging.getLogger(__name__)
MAX_ROLLBACKS = 3


def train(
    config: Config,
    stop: StopRequest,
    observer: Observer | None = None,
    change: Change | None = None,
) -> Outcome:
    """Train up to `config.train.steps`, from the newest good checkpoint of the workdir if any.

    observer: called at steps, evaluations and lines of the run.
    change: replaces functions of the run by your own (`hnet.train.compiled_run.Experiment`).

    Raises ConfigError for settings that cannot work, before any file is written, and StopRun if
    training fails.
    """
    distributed.on_first_host("workdir", lambda: check_workdir(config.workdir))
    corpus = open_corpus(config.data)
    read = run_inputs(config, corpus)
    program = build(config, change=change) if change else build(config)
    own = replace(config.distributed, process_id=None)
    same = distributed.host_facts(to_json(replace(config, distributed=own)))
    distributed.assert_same_on_all_hosts(same | read)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_workdir(config, read))
        checkpoints = stack.enter_context(Checkpointer(config.workdir, config.checkpoint))
        state, position, origin = first_state(config, checkpoints, program)
        start = Start(int(state.step), position.bytes_seen, position.evaluated)
        check_steps(config, config.workdir, start.step)
        batches = _open_batches(config, corpus, position.data)
        stack.callback(lambda: batches.close())
        report = RunLogger(config, corpus, start, observer)
        lines = distributed.on_first_host(
            "claim",
            lambda: claim_workdir(
                config, read, done=start.step, ended=start.is_end(config.train.steps)
            ),
        )
        if peak := peak_of(program.mesh, config.model.compute.dtype):
            report.utilization = Utilization(config, peak)
        stack.enter_context(report)
        opening = first_lines(config, corpus, program, start.step)
        for line in (*lines, *origin, *opening):
            report.say(line)
        watchdog = stack.enter_context(Watchdog(config.workdir, config.watchdog))
        session = Session(config, corpus, program, checkpoints, report, watchdog, stop)
        while True:
            try:
                return _loop(session, state, position, batches)
            except NonFinite as fault:
                position.data = batches.position
                batches.close()
                state, position = _roll_back(session, position, fault)
                batches = _open_batches(config, corpus, position.data)


def _loop(
    session: Session, state: TrainState, position: RunState, batches: BatchIterator
) -> Outcome:
    """Train until the last step or a stop request. Raises NonFinite, StopRun, ConfigError."""
    config, program, report = session.config, session.program, session.report
    done = int(state.step)
    # A start from other weights is saved: it then depends on them no longer.
    saved = -1 if config.init.from_ and not session.checkpoints.steps() else done
    ladder = program.ladder
    if position.ladder:
        if not ladder.has_unit_of(position.ladder):
            position.new_counts = ()
        ladder = ladder.with_json(position.ladder)
    segment = segmenter(
        program.graph, config.model, replicated(program.mesh), bos=config.data.bos_eos
    )
    inflight: InFlight | None = None
    while True:
        row, evaluation, last = None, None, done == config.train.steps
        is_new = position.evaluated != done
        evaluates = last or (is_new and _due(done, config.eval.every))
        if evaluates:
            if inflight:
                row, inflight = _read(session, inflight, position, batches), None
            if last and position.settled != done:
                state = _with_exact_offsets(session, state, ladder)
                position.settled = done
            evaluation = _evaluate(session, state, done, ladder, whole=last)
            if evaluation:
                shown = evaluated_params(config, state)
                report.evaluated(done, evaluation, row, segment, shown, is_new=is_new)
                position.evaluated = done
        stopping = session.stop.stop_requested(done)
        saves = stopping or last or saved < 0 or _due(done, config.checkpoint.every)
        if saves and inflight:
            row, inflight = _read(session, inflight, position, batches), None
        if row:
            _report_step(session, row)
        if saves and done > saved:
            session.watchdog.beat("save")
            report.save()
            position.ladder, position.data = ladder.to_json(), batches.position
            extras = {"position": asdict(position), "config": to_json(config)}
            session.checkpoints.save(done, state, extras)
            saved = done
        if last or stopping:
            session.checkpoints.wait()
            return Outcome(state, evaluation if last else None, program, session.corpus)

        session.watchdog.beat("load")
        batch = next(batches)
        session.watchdog.beat("step")
        with report.trace.step(done):
            state, metrics = program.step(
                state, put_batch(batch, program.mesh), program.hparams,
                capacities=ladder.capacities,
            )  # fmt: skip
        done += 1
        if inflight:
            _report_step(session, _read(session, inflight, position, batches))
        inflight = InFlight(done, metrics, ladder.capacities, batches.position - 1)
        ladder, before = ladder.observe(position.new_counts), ladder
        if ladder.capacities != before.capacities:
            sizes = (" / ".join(map(str, c)) for c in (before.capacities, ladder.capacities))
            report.say(
                f"step {done}: chunk slots per row {' -> '.join(sizes)} (a new size compiles)"
            )
        session.checkpoints.check()


def evaluated_params(config: Config, state: TrainState) -> Any:
    """Parameters that evaluations read: those of the last update, or their moving average."""
    return state.ema if config.eval.ema else state.params


def _with_exact_offsets(
    session: Session, state: TrainState, ladder: CapacitySchedule
) -> TrainState:
    def exact(params):
        return set_exact_offsets(
            session.program, params, session.corpus, [session.config], ladder.capacities,
            beat=partial(session.watchdog.beat, "offsets"),
        )  # fmt: skip

    return state._replace(
        params=exact(state.params), ema=exact(state.ema) if state.ema else state.ema
    )


def _evaluate(
    session: Session, state: TrainState, done: int, ladder: CapacitySchedule, *, whole: bool
) -> Evaluation | None:
    """Score held-out text; None if a stop was requested, which is checked between batches."""
    session.watchdog.beat("eval")
    config = session.config
    return run_evaluation(
        session.program, evaluated_params(config, state), session.corpus.heldout, config,
        ladder.capacities,
        max_bytes=None if whole else config.eval.max_bytes,
        should_stop=lambda: session.stop.stop_requested(done),
    )  # fmt: skip


def _report_step(session: Session, row: dict[str, Any]) -> None:
    alarms = session.report.step(row)
    if alarms and session.config.train.stop_on_alarm:
        raise StopRun(f"train.stop_on_alarm=True and {alarms[0]}")


def _due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0


def _read(
    session: Session, inflight: InFlight, position: RunState, batches: BatchIterator
) -> dict[str, Any]:
    """Wait for a step and build its row of metrics.jsonl. Raises NonFinite after too many skips."""
    config = session.config
    metrics = jax.device_get(inflight.metrics)
    position.bytes_seen += int(metrics["bytes"])
    stages = range(config.model.num_chunked)
    position.new_counts = tuple(int(metrics[f"stage{s}/max_slots"]) for s in stages)
    skipped = int(metrics["skipped_in_a_row"])
    found = int(metrics.pop("first_non_finite", -1))
    tensor = session.program.watched[found] if skipped and found >= 0 else ""
    if skipped >= config.train.max_skipped:
        raise NonFinite(skipped, inflight.step, tensor)
    rows_of_slots = config.data.batch_size // session.program.ladder.rows_sharing_slots
    slots = [rows_of_slots * c for c in inflight.capacities]
    row: dict[str, Any] = {
        "step": inflight.step,
        "bytes_seen": position.bytes_seen,
        "batch": fingerprint(metrics.pop("batch_hash")),
        "input/wait_seconds": batches.wait_seconds,
        "metrics": metrics,
    }
    if tensor:
        row["non_finite"] = tensor
    names = session.corpus.train.source_names
    if len(names) > 1:
        added = batches.source_bytes(inflight.batch)
        before = position.source_bytes or (0,) * len(names)
        position.source_bytes = tuple(int(n + a) for n, a in zip(before, added))
        row |= {f"bytes_seen/{name}": n for name, n in zip(names, position.source_bytes)}
    for s in stages:
        kept = float(metrics[f"stage{s}/chunks"]) * (1 - float(metrics[f"stage{s}/overflow_frac"]))
        row[f"stage{s}/capacity"] = inflight.capacities[s]
        row[f"stage{s}/slot_utilization"] = kept / slots[s]
    return row


def _open_batches(config: Config, corpus: Corpus, start: int) -> BatchIterator:
    return train_batches(
        corpus, config.data, seed=config.seed, start=start,
        process_index=distributed.host_id(), process_count=distributed.num_hosts(),
        route_groups=config.model.route_groups, tells_sources=config.train.log_groups,
    )  # fmt: skip


def _roll_back(session: Session, failed: RunState, fault: NonFinite) -> tuple[TrainState, RunState]:
    """Restore the last good checkpoint before the fault; data continue after it. Raises StopRun.

    Checkpoints saved since the fault began are renamed, so that no later start resumes from them.
    """
    config, checkpoints = session.config, session.checkpoints
    if config.train.on_non_finite == "stop" or failed.rollbacks >= MAX_ROLLBACKS:
        raise StopRun(f"{fault}: lower optim.learning_rate or optim.clip_norm")
    checkpoints.wait()
    if checkpoints.latest_good_step(fault.good_step) is None:
        raise StopRun(
            f"{fault}, and there is no checkpoint of before to go back to: lower checkpoint.every"
        )
    state, position = restored(checkpoints, session.program, latest=fault.good_step)
    checkpoints.set_aside_after(int(state.step))
    position.data, position.rollbacks = failed.data, failed.rollbacks + 1
    start = Start(int(state.step), position.bytes_seen, position.evaluated)
    session.report.rolled_back(start, str(fault))
    return state, position
