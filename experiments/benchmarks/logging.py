"""What logging costs: blocks of steps with and without it alternate in one run.

    python -m experiments.benchmarks.logging [NAME] [--section.field VALUE ...]

Takes the settings of `experiments.pretrain` and trains in a folder that is deleted afterwards.
"With logging" means a row of scalars and histograms at every step, so that the cost exceeds the
noise of the machine; a run that logs every tenth step pays a tenth of it. Four consecutive blocks
are one sample: without, with, with, without, so that a steady drift of the machine's speed affects
both sides equally. Samples with a compilation or an evaluation are left out. What an evaluation
draws and writes is timed separately, on fewer evaluations than the settings ask for, and divided by
`eval.every` steps.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hnet.command_line import run
from hnet.errors import ConfigError
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.runtime.stop_request import StopRequest
from hnet.train.loop import train
from hnet.train.named import run_config
from hnet.train.observer import Observer

BLOCK = 5  # steps per block
SAMPLE = 4  # blocks per sample
SAMPLES_AN_EVALUATION = 5
DRAWS = 10_000  # bootstrap resamples


class Alternating(Observer):
    """Has half of the blocks of steps logged, and times both halves."""

    def __init__(self):
        self.began: dict[int, float] = {}  # when the report of each step began
        self.disturbed: set[int] = set()  # blocks that evaluated or compiled
        self.calls: list[float] = []  # seconds inside the report of each step that was logged
        self.drawing: list[float] = []  # seconds of each evaluation's texts and summaries

    def step(self, row):
        step = row["step"]
        self.began[step] = time.perf_counter()
        return step // BLOCK % SAMPLE not in (0, 1)  # samples begin with block 1, 5, ...

    def logged(self, row, seconds):
        self.calls.append(seconds)

    def said(self, text):
        self.disturbed.add(max(self.began, default=0) // BLOCK)

    def evaluated(self, step, evaluation, seconds):
        self.drawing.append(seconds)

    def samples(self) -> np.ndarray:
        """Seconds per step with and without, per undisturbed sample, float64 (samples, 2)."""
        found = []
        for first in range(1, max(self.began, default=0) // BLOCK, SAMPLE):
            edges = [self.began.get(b * BLOCK) for b in range(first, first + SAMPLE + 1)]
            # a block after a compilation may still be filling the pipeline
            if None not in edges and not self.disturbed.intersection(
                range(first - 1, first + SAMPLE)
            ):
                off, on, on_too, off_too = np.diff(edges) / BLOCK
                found.append(((on + on_too) / 2, (off + off_too) / 2))
        return np.array(found).reshape(-1, 2)


def main() -> None:
    config = run_config()
    enable_compilation_cache()
    report = Alternating()
    every = SAMPLES_AN_EVALUATION * SAMPLE * BLOCK if config.eval.every else 0
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        measured = replace(
            config,
            workdir=folder,
            train=replace(config.train, log_every=1),
            eval=replace(config.eval, every=every),
        )
        train(measured, stop, report)
    samples = report.samples()
    if len(samples) < 2:
        raise ConfigError(
            f"train.steps={config.train.steps}: too few undisturbed samples of "
            f"{SAMPLE * BLOCK} steps: use more steps"
        )
    on, off = samples.T
    step = np.median(off)
    row = np.array(median_with_interval(on / off - 1))
    inside = float(np.mean(report.calls[BLOCK:]))
    print(f"step with a row logged {1e3 * np.median(on):7.1f} ms (median of {len(on)} samples)")
    print(f"step without           {1e3 * step:7.1f} ms")
    print(f"a row                 {_with_interval(row)} of a step")
    print(f"of it inside calls     {1e3 * inside:7.2f} ms, {inside / step:.2%}")
    cost = row / config.train.log_every
    print(f"a row in {config.train.log_every:<3} steps      {_with_interval(cost)}")
    if len(report.drawing) > 1 and config.eval.every:  # the first one compiles
        drawing = float(np.median(report.drawing[1:]))
        share = drawing / config.eval.every / step
        every = f"every {config.eval.every} steps: {share:.2%}"
        print(f"drawing an evaluation  {1e3 * drawing:7.1f} ms, {every}")
        print(f"altogether            {_with_interval(cost + share)}")


def _with_interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:+8.2%} ({low:+.2%} to {high:+.2%} with 95%, by bootstrap)"


def median_with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median and the interval that holds 95% of the medians of resampled values."""
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


if __name__ == "__main__":
    run(main)
