"""What logging costs: blocks of steps with it and without it take turns in one run.

    python -m experiments.benchmark_logging [NAME] [--section.field VALUE ...]

Takes the settings of `experiments.pretrain` and trains in a folder that is deleted afterwards. A
block is `train.log_every` steps, so that each one with logging writes one row of scalars and
histograms; its neighbours without are what it is compared with. Blocks that compile or evaluate are
left out. What an evaluation draws and writes is timed apart and spread over `eval.every` steps.
"""

import tempfile
import time
from dataclasses import replace

import numpy as np

from experiments.command_line import run, run_config
from hnet.config import ConfigError
from hnet.train.compile_cache import enable_compilation_cache
from hnet.train.distributed import StopRequest
from hnet.train.loop import train
from hnet.train.report import Report


class Alternating(Report):
    """A report that is silent in every other block of steps, and watches the clock."""

    def __init__(self, *args):
        super().__init__(*args)
        self.block = self.config.train.log_every
        self.began: dict[int, float] = {}  # when the report of each step began
        self.disturbed: set[int] = set()  # blocks that evaluated or compiled
        self.calls: list[float] = []  # seconds inside the report of each step that is logged
        self.drawing: list[float] = []  # seconds of each evaluation's texts and summaries

    def step(self, row):
        step = row["step"]
        self.began[step] = time.perf_counter()
        if step // self.block % 2 == 0:
            return []
        alarms = super().step(row)
        self.calls.append(time.perf_counter() - self.began[step])
        return alarms

    def say(self, text):
        self.disturbed.add(max(self.began, default=0) // self.block)
        super().say(text)

    def evaluated(self, *args):
        began = time.perf_counter()
        super().evaluated(*args)
        self.drawing.append(time.perf_counter() - began)

    def pairs(self) -> np.ndarray:
        """Seconds a step of neighbouring blocks (with, without), float64 (pairs, 2)."""
        found = []
        for n in range(1, max(self.began) // self.block - 1, 2):
            edges = [self.began.get(b * self.block) for b in (n, n + 1, n + 2)]
            # a block after a compilation may still be filling the pipeline
            if None not in edges and not {n - 1, n, n + 1, n + 2} & self.disturbed:
                found.append(np.diff(edges) / self.block)
        return np.array(found).reshape(-1, 2)


def main() -> None:
    config = run_config()
    enable_compilation_cache()
    reports: list[Alternating] = []

    def make_report(*args):
        reports.append(Alternating(*args))
        return reports[-1]

    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        train(replace(config, workdir=folder), stop, make_report)
    (report,) = reports
    pairs = report.pairs()
    if len(pairs) < 2:
        raise ConfigError(
            f"train.steps={config.train.steps}: too few undisturbed blocks of "
            f"{report.block} steps: use more steps"
        )
    on, off = pairs.T
    ratios = on / off - 1
    error = ratios.std(ddof=1) / np.sqrt(len(ratios))
    inside = float(np.mean(report.calls[report.block :]))
    print(f"step with logging     {1e3 * np.median(on):8.1f} ms (median of {len(on)} blocks)")
    print(f"step without          {1e3 * np.median(off):8.1f} ms")
    print(f"logging a step        {ratios.mean():+8.2%} (standard error {error:.2%})")
    print(f"of it inside calls    {1e3 * inside:8.2f} ms, {inside / off.mean():.2%}")
    if len(report.drawing) > 1 and config.eval.every:  # the first one compiles
        drawing = float(np.median(report.drawing[1:]))
        share = drawing / config.eval.every / off.mean()
        every = f"every {config.eval.every} steps: {share:.2%}"
        print(f"drawing an evaluation {1e3 * drawing:8.1f} ms, {every}")


if __name__ == "__main__":
    run(main)
