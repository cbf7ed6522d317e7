"""What a run tells people: metrics.jsonl, TensorBoard, alarms, and one live line."""

import contextlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hnet.data import Corpus
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.inspect.writer import RunWriter
from hnet.loss import PROB_BINS, bits_per_byte
from hnet.train import distributed
from hnet.train.alarms import BoundaryAlarms
from hnet.train.config import Config, ProfileConfig
from hnet.train.evaluate import Evaluation
from hnet.train.log_folder import METRICS, TENSORBOARD, LogFolder
from hnet.train.probes import probe_texts


class Report:
    """Everything that process 0 shows and writes while a run goes on; silent on the others."""

    def __init__(self, config: Config, corpus: Corpus, start_step: int):
        self.config, self.start_step = config, start_step
        self.speaks = distributed.host_id() == 0
        self.probes = probe_texts(corpus.heldout, config.eval)
        self.folder = LogFolder(config.workdir, goes_on=self.speaks)
        tensorboard = self.folder.path / TENSORBOARD
        self.trace = Trace(config.profile, tensorboard)
        self.metrics = self.writer = None
        if self.speaks:
            self.metrics = MetricsFile(self.folder.path, start_step)
            # a start at 0 goes on after no step, whatever an earlier one logged
            self.writer = RunWriter(tensorboard, resume_step=start_step or -1, say=self.say)
            self.writer.configuration(start_step, to_json(config))
        self.line = LiveLine(config.train.steps, start_step, enabled=self.speaks)
        for note in self.writer.notes if self.writer else ():
            self.say(note)
        is_held = tuple(s.chunking.hold_rate for s in config.model.stages[:-1])
        self.alarms = BoundaryAlarms(is_held, config.controller.hold_from(config.train.steps))
        self.logged_at, self.logged_bytes, self.logged_wait = time.monotonic(), None, 0.0
        if self.speaks and start_step:
            self.say(f"resuming at step {start_step}")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exc_info) -> None:
        self.trace.close()
        if self.writer:
            self.writer.close()
        self.folder.close()
        self.line.close()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.line.say(text)

    def step(self, row: dict[str, Any]) -> list[str]:
        """Show a step; log it if it is one of every `log_every`, the first, or was evaluated.

        Returns the boundary alarms that it raised, a line each.
        """
        metrics = row.pop("metrics")
        step, is_logged = row["step"], row["step"] == 1 or "eval/bpb" in row
        alarms = self._watch_boundaries(step, metrics)
        if is_logged or step % self.config.train.log_every == 0:
            self._log(row, metrics)
        return alarms

    def _log(self, row: dict[str, Any], metrics: dict[str, Any]) -> None:
        row["train/bpb"] = bits_per_byte(float(metrics["nats"]), int(metrics["bytes"]))
        row |= {k: v.item() for k, v in metrics.items() if v.ndim == 0 and k != "nats"}
        self._add_speed(row)
        self.line.show(row)
        if not self.speaks:
            return
        self.metrics.write(row)
        logged = ("step", "eval/", "probe/")  # an event has its step; `evaluated` wrote the others
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        scalars = {k: v for k, v in numbers.items() if not k.startswith(logged)}
        self.writer.scalars(row["step"], scalars)
        for name, counts in metrics.items():
            if name.endswith("prob_hist"):
                middles = (np.arange(PROB_BINS) + 0.5) / PROB_BINS
                values = np.repeat(middles, counts)
                self.writer.histogram(row["step"], name, values, np.linspace(0, 1, PROB_BINS + 1))

    def _add_speed(self, row: dict[str, Any]) -> None:
        """bytes_per_sec, and the share of time spent waiting for data, since the last line."""
        now, wait = time.monotonic(), row.pop("input/wait_seconds")
        seen, seconds = row["bytes_seen"], max(now - self.logged_at, 1e-9)
        before = seen - row["bytes"] if self.logged_bytes is None else self.logged_bytes
        row["bytes_per_sec"] = (seen - before) / seconds
        row["input/stall_frac"] = (wait - self.logged_wait) / seconds
        self.logged_at, self.logged_bytes, self.logged_wait = now, seen, wait

    def _watch_boundaries(self, step: int, metrics: dict[str, Any]) -> list[str]:
        stages = range(self.config.model.num_chunked)
        rates, targets = (
            tuple(float(metrics[f"stage{s}/{name}"]) for s in stages)
            for name in ("boundary_rate", "target_rate")
        )
        alarms = self.alarms.check(step, rates, targets)
        for alarm in alarms:
            self.say(alarm)
        if int(metrics["skipped_in_a_row"]):
            self.say(f"step {step}: update skipped, loss or gradient is not finite")
        for s in stages:
            if lost := float(metrics[f"stage{s}/overflow_frac"]):
                self.say(f"step {step}: overflow: {lost:.2%} of stage {s}'s chunks were clipped")
        return alarms

    def evaluated(self, step, evaluation: Evaluation, row, segment, params) -> None:
        """Log an evaluation, into the row of its step if there is one, and draw the probe texts."""
        results = evaluation.metrics()
        texts = [probe.data for probe in self.probes]
        names, gold = [p.name for p in self.probes], [dict(p.gold) for p in self.probes]
        drawn = segment(params, texts, names, gold)
        if self.speaks:
            self.writer.scalars(step, results)
            results |= self.writer.write_segmentations(step, drawn)
        if row is not None:
            row |= results
        elif self.metrics:  # resumed at this step, whose row is written already
            self.metrics.amend(step, results)
        sizes = [
            f"{evaluation.bytes_per_chunk(s):.2f}" for s in range(len(evaluation.chunks_by_stage))
        ]
        chunks = f", {' / '.join(sizes)} bytes/chunk" if sizes else ""
        self.say(f"step {step}: held-out {evaluation.bpb:.4f} bpb{chunks}")

    def rolled_back(self, step: int, why: str) -> None:
        """Go on from an earlier step."""
        self.say(f"{why}: rolled back to step {step}")
        if self.metrics:
            self.metrics = MetricsFile(self.folder.path, step)
            self.writer.go_back(step)


class Trace:
    """A profile of the steps FIRST to LAST - 1, written where TensorBoard's profile plugin looks.

    A run that resumes between them traces the rest; one that ends there keeps what it has.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self.first, self.last = config.range
        if self.last and _loads_libtpu_in_vain():
            raise ConfigError(
                f"profile.steps={config.steps!r}: libtpu is loaded but there is no TPU, and its "
                "profiler would kill the process: set the environment variable JAX_PLATFORMS=cpu"
            )
        self.folder, self.is_running = folder, False

    @contextlib.contextmanager
    def step(self, done: int):
        """Around the step that follows `done` steps."""
        if self.first <= done < self.last and not self.is_running:
            jax.profiler.start_trace(str(self.folder))
            self.is_running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield
        if done + 1 >= self.last:
            self.close()

    def close(self) -> None:
        if self.is_running:
            jax.profiler.stop_trace()
        self.is_running = False


def _loads_libtpu_in_vain() -> bool:
    """Whether JAX loads libtpu though nothing here is a TPU, as `tpu.plan` needs it."""
    wanted = jax.config.jax_platforms or "tpu"
    is_installed = importlib.util.find_spec("libtpu") is not None
    return "tpu" in wanted and is_installed and jax.default_backend() != "tpu"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl as far as they are there; a torn line is left out."""
    file, rows = epath.Path(workdir) / METRICS, []
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended by one process.

    Lines of steps after `step`, which a resumed run does again, are dropped when it starts: they
    come again with the same numbers. A half-written last line is dropped too.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / METRICS
        if self.path.exists():
            lines = self.path.read_text().splitlines(True)
            self._replace([line for line in lines if _is_kept(line, step)])

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the last line if it is that of `step`."""
        lines = self.path.read_text().splitlines(True) if self.path.exists() else []
        if lines and (row := json.loads(lines[-1]))["step"] == step:
            self._replace([*lines[:-1], json.dumps(row | values) + "\n"])

    def _replace(self, lines: list[str]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(lines))
        temporary.rename(self.path)


def _is_kept(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class LiveLine:
    """step, bits a byte, bytes a second, bytes a chunk of each stage, time left.

    A bar in a terminal, a line every few seconds elsewhere.
    """

    def __init__(self, total: int, start: int, *, enabled: bool = True, seconds: float = 10.0):
        self.console = Console(quiet=not enabled, highlight=False)
        self.total, self.start, self.seconds = total, start, seconds
        self.began = self.printed = time.monotonic()
        self.bar = None
        if enabled and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("compiling", total=total, completed=start)

    def say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def show(self, row: dict[str, Any]) -> None:
        chunks, s = [], 0
        while (size := row.get(f"stage{s}/bytes_per_chunk")) is not None:
            chunks.append(f"{size:.2f}")
            s += 1
        text = f"step {row['step']}/{self.total}  {row['train/bpb']:.3f} bpb  "
        text += f"{row['bytes_per_sec']:,.0f} bytes/s  {' / '.join(chunks) or '-'} bytes/chunk"
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=row["step"], description=text)
        elif now - self.printed > self.seconds or row["step"] == self.total:
            self.printed = now
            pace = (now - self.began) / max(row["step"] - self.start, 1)
            self.say(f"{text}  {_duration(pace * (self.total - row['step']))} left")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
