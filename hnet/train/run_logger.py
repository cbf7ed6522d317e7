"""The logs of a run: metrics.jsonl, TensorBoard, alarms, and one live line."""

import time
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from hnet.data import Corpus
from hnet.errors import ConfigError, Failed
from hnet.fields import to_json
from hnet.inspect.tags import tag_of
from hnet.inspect.writer import RunWriter, short_names
from hnet.loss import PROB_BINS, bits_per_byte
from hnet.runtime import distributed
from hnet.train.alarms import BoundaryAlarms
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.groups import group_bpb
from hnet.train.live_line import LiveLine
from hnet.train.log_folder import TENSORBOARD, LogFolder
from hnet.train.metrics_file import MetricsFile
from hnet.train.observer import Observer
from hnet.train.probes import probe_texts
from hnet.train.trace import Trace
from hnet.train.tracker import guarded
from hnet.train.utilization import Utilization


class Start(NamedTuple):
    """Point where a run starts or continues: step 0, a checkpoint, or a rollback."""

    step: int = 0
    bytes_seen: int = 0
    evaluated: int = -1
    """step of the last evaluation that was logged"""

    def is_end(self, steps: int) -> bool:
        """Whether a run of `steps` steps has nothing left to do or log."""
        return self.step == self.evaluated == steps


class RunLogger:
    """Logger of a run: process 0 prints and writes, the other processes do neither.

    The constructor writes nothing; files are open only inside the context. A run that has already
    ended writes nothing.
    """

    def __init__(
        self, config: Config, corpus: Corpus, start: Start, observer: Observer | None = None
    ):
        """Raises ConfigError for unreadable probe files and for steps that cannot be profiled."""
        self.config, self.start, self.observer = config, start, observer or Observer()
        self.speaks = distributed.host_id() == 0
        self.probes = probe_texts(corpus.heldout, config.eval)
        self.globs = corpus.train.globs
        self.trace = Trace(config.profile, say=self.say)
        self.tracker = guarded(config.tracker, self.say)
        self.folder = self.metrics = self.writer = None
        self.utilization: Utilization | None = None
        self.is_held = tuple(s.chunking.hold_rate for s in config.model.stages[:-1])

    def __enter__(self) -> "RunLogger":
        self.line = LiveLine(self.config.train.steps, self.start.step, enabled=self.speaks)
        try:
            if not self.start.is_end(self.config.train.steps):
                self._open()
        except BaseException:
            self.__exit__()
            raise
        self._start(self.start)
        self.trace.listen()
        return self

    def _open(self) -> None:
        self.folder = LogFolder(self.config.workdir, goes_on=self.speaks)
        tensorboard = self.folder.path / TENSORBOARD
        self.trace.folder = tensorboard
        if self.speaks:
            step = self.start.step
            self.metrics = MetricsFile(self.folder.path, step, say=self.say)
            try:  # a start at step 0 keeps no steps of an earlier run
                self.writer = RunWriter(tensorboard, resume_step=step or -1, say=self.say)
            except ConfigError as e:
                raise Failed(str(e)) from None
            self.writer.configuration(step, to_json(self.config))
            for note in self.writer.notes:
                self.say(note)
            if self.tracker:
                self.tracker.begin(to_json(self.config))

    def _start(self, start: Start) -> None:
        """Reset alarms, speed and time left, so that they use only the steps that follow."""
        config = self.config
        self.alarms = BoundaryAlarms(
            self.is_held, config.rate_control.hold_from(config.train.steps)
        )
        self.logged_at, self.logged_bytes = time.monotonic(), start.bytes_seen
        self.logged_compiled = self.line.compiled()
        self.logged_wait = self.flops = 0.0
        self.line.restart(start.step)

    def __exit__(self, *exc_info) -> None:
        self.trace.end()
        if self.metrics:
            self.metrics.close()
        if self.writer:
            self.writer.close()
            if self.tracker:
                self.tracker.end()
        if self.folder:
            self.folder.close()
        self.line.close()

    def save(self) -> None:
        """Copy the logs to a bucket, if any, so that they are never older than a checkpoint."""
        if self.folder:
            self.folder.copy()

    def say(self, text: str) -> None:
        """Print one permanent line."""
        self.observer.said(text)
        self.line.say(text)

    def step(self, row: dict[str, Any]) -> list[str]:
        """Check a step; log step 1, multiples of `log_every`, evaluated and skipped steps.

        Returns its new boundary alarms, one line per alarm.
        """
        began = perf_counter()
        if not self.observer.step(row):
            return []
        metrics = row.pop("metrics")
        self.line.first_step(row["step"])
        step, is_logged = row["step"], row["step"] == 1 or "eval/bpb" in row
        alarms = self._watch_boundaries(step, metrics)
        if self.utilization:
            self.flops += self.utilization.flops(self._chunks(metrics))
        if self._say_skipped(row, metrics) or is_logged or step % self.config.train.log_every == 0:
            self._log(row, metrics)
        self.observer.logged(row, perf_counter() - began)
        return alarms

    def _log(self, row: dict[str, Any], metrics: dict[str, Any]) -> None:
        row["train/bpb"] = bits_per_byte(float(metrics["nats"]), int(metrics["bytes"]))
        row |= group_bpb(metrics, self.globs)
        row |= {k: v.item() for k, v in metrics.items() if v.ndim == 0 and k != "nats"}
        self._add_speed(row)
        self.line.show(row)
        if not self.speaks:
            return
        self.metrics.write(row)
        logged = ("step", "eval/", "probe/")  # an event has its step; `evaluated` wrote the rest
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        scalars = {k: v for k, v in numbers.items() if not k.startswith(logged)}
        self._scalars(row["step"], scalars)
        for name, counts in metrics.items():
            if name.endswith("prob_hist"):
                middles = (np.arange(PROB_BINS) + 0.5) / PROB_BINS
                values = np.repeat(middles, counts)
                self.writer.histogram(row["step"], name, values, np.linspace(0, 1, PROB_BINS + 1))

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self.writer.scalars(step, values)
        if self.tracker:
            shown = short_names(values)
            self.tracker.scalars(step, {tag_of(shown[k]).name: v for k, v in values.items()})

    def _add_speed(self, row: dict[str, Any]) -> None:
        """Add bytes_per_sec, the fraction of time spent waiting for data, and the model FLOP
        utilization if the peak of the devices is known, since the last row and without
        compilation."""
        now, wait = time.monotonic(), row.pop("input/wait_seconds")
        compiled = self.line.compiled()
        elapsed = max(now - self.logged_at, 1e-9)
        spent = elapsed - (compiled - self.logged_compiled)  # below 0 if threads compiled at once
        seen, seconds = row["bytes_seen"], spent if spent > 0 else elapsed
        self.logged_compiled = compiled
        row["bytes_per_sec"] = (seen - self.logged_bytes) / seconds
        row["input/stall_frac"] = (wait - self.logged_wait) / seconds
        if self.utilization:
            row["mfu"] = self.flops / seconds / self.utilization.peak
        self.logged_at, self.logged_bytes, self.logged_wait = now, seen, wait
        self.flops = 0.0

    def _chunks(self, metrics: dict[str, Any]) -> list[float]:
        """Number of chunks of each stage that found a slot."""
        return [
            float(metrics[f"stage{s}/chunks"]) * (1 - float(metrics[f"stage{s}/overflow_frac"]))
            for s in range(self.config.model.num_chunked)
        ]

    def _watch_boundaries(self, step: int, metrics: dict[str, Any]) -> list[str]:
        stages = range(self.config.model.num_chunked)
        rates, targets = (
            tuple(float(metrics[f"stage{s}/{name}"]) for s in stages)
            for name in ("boundary_rate", "target_rate")
        )
        alarms = self.alarms.check(step, rates, targets)
        for alarm in alarms:
            self.say(alarm)
        for s in stages:
            if lost := float(metrics[f"stage{s}/overflow_frac"]):
                self.say(f"step {step}: overflow: {lost:.2%} of stage {s}'s chunks were clipped")
        return alarms

    def _say_skipped(self, row: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Print why the update was skipped, if it was; returns whether it was."""
        why = ""
        if int(metrics["skipped_in_a_row"]):
            why = "loss or gradient is not finite"
            if tensor := row.get("non_finite"):
                why += f", first in {tensor}"
        elif int(metrics.get("spike", 0)):
            loss, norm = float(metrics["loss/total"]), float(metrics["grad_norm"])
            why = f"a spike: loss {loss:.4g}, gradient norm {norm:.4g}"
        if why:
            self.say(f"step {row['step']}: update skipped, {why}")
        return bool(why)

    def evaluated(
        self, step, evaluation: Evaluation, row, segment, params, *, is_new: bool = True
    ) -> None:
        """Log an evaluation, in the row of its step if given, and draw the probe texts.

        is_new: False if an earlier start has logged it; then it is only printed.
        """
        began = perf_counter()
        if is_new:
            self._log_evaluation(step, evaluation.metrics(), row, segment, params)
        sizes = [
            f"{evaluation.bytes_per_chunk(s):.2f}" for s in range(len(evaluation.chunks_by_stage))
        ]
        chunks = f", {' / '.join(sizes)} bytes/chunk" if sizes else ""
        self.say(f"step {step}: held-out {evaluation.bpb:.4f} bpb{chunks}")
        self.observer.evaluated(step, evaluation, perf_counter() - began)

    def _log_evaluation(self, step, results: dict[str, Any], row, segment, params) -> None:
        texts = [probe.data for probe in self.probes]
        names, gold = [p.name for p in self.probes], [dict(p.gold) for p in self.probes]
        try:
            drawn = segment(params, texts, names, gold)
        except ConfigError as e:  # probabilities that are not finite; training notices by itself
            self.say(f"step {step}: the texts are not drawn: {e}")
            drawn = []
        if self.writer:
            self._scalars(step, results)
            results |= self.writer.write_segmentations(step, drawn)
        if row is not None:
            row |= results
        elif self.metrics:  # resumed at this step, whose row is already written
            self.metrics.amend(step, results)

    def rolled_back(self, start: Start, why: str) -> None:
        """Continue from an earlier step: drop the logs of later steps."""
        self.say(f"{why}: rolled back to step {start.step}")
        if self.metrics:
            self.metrics.go_back(start.step)
            self.writer.go_back(start.step)
        self._start(start)
