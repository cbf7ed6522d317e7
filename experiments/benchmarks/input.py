"""What the input pipeline of a run delivers by itself, against what the run consumed.

    python -m experiments.benchmarks.input --checkpoint WORKDIR [--seconds 5]

Builds the batches of that run, starting with the first, and discards them. About half a minute for
the default job on two CPU cores.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hnet.bounds import Bounds, FilePath, Repeats
from hnet.command_line import parse, run
from hnet.data import BatchIterator, open_corpus, train_batches
from hnet.errors import ConfigError
from hnet.files import json_text, parse_json, read_bytes
from hnet.train.workdir import read_config
from hnet.weights.sources import resolve_run


@dataclass(frozen=True)
class InputBenchmark:
    """Which run's input to measure, and how long."""

    checkpoint: FilePath
    """work directory of a run"""
    seconds: Annotated[float, Bounds(above=0, most=86_400)] = 5.0
    """duration of one measurement"""
    repeats: Repeats = 5
    """number of measurements; the median is reported"""
    json: bool = False
    """print one JSON object instead of lines"""


def delivered(batches: BatchIterator, seconds: float) -> float:
    """Source bytes per second that the pipeline delivers to a caller that does nothing else."""
    num_bytes, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        num_bytes += int(next(batches)["loss_mask"].sum())
    return num_bytes / elapsed


def consumed(workdir: str) -> tuple[float, float]:
    """(median bytes per second, share of the time spent waiting for input) from a run's log.

    The first line is left out because it includes start-up. Raises ConfigError if it is the only
    one.
    """
    file = Path(workdir) / "metrics.jsonl"
    try:
        rows = [parse_json(line) for line in read_bytes(file).splitlines()][1:]
    except (OSError, ValueError) as e:
        raise ConfigError(f"{str(file)!r} cannot be read ({e}): train first") from None
    if not rows:
        raise ConfigError(f"{str(file)!r} has fewer than two lines: train longer")
    steps = [row["step"] for row in rows]
    weights = [b - a for a, b in zip([1, *steps], steps)]
    stalls = sum(w * row["input/stall_frac"] for w, row in zip(weights, rows)) / sum(weights)
    return statistics.median(row["bytes_per_sec"] for row in rows), stalls


def measure(options: InputBenchmark) -> dict[str, float]:
    workdir = resolve_run(options.checkpoint).path
    config = read_config(workdir)
    used, stall = consumed(workdir)
    groups = config.model.route_groups
    corpus = open_corpus(config.data)
    with train_batches(corpus, config.data, seed=config.seed, route_groups=groups) as batches:
        next(batches)  # starts the workers
        rates = [delivered(batches, options.seconds) for _ in range(options.repeats)]
    rate = statistics.median(rates)
    return {
        "pipeline_bytes_per_sec": rate,
        "run_bytes_per_sec": used,
        "ratio": rate / used,
        "run_stall_frac": stall,
    }


def main() -> None:
    options = parse(InputBenchmark)
    found = measure(options)
    if options.json:
        print(json_text(found))
        return
    print(f"pipeline only  {found['pipeline_bytes_per_sec']:>12,.0f} bytes/s")
    print(f"the run        {found['run_bytes_per_sec']:>12,.0f} bytes/s")
    print(f"ratio          {found['ratio']:>12,.1f}")
    print(f"run waited     {found['run_stall_frac']:>12.3%} of its time for input")


if __name__ == "__main__":
    run(main)
