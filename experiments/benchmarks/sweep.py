"""A sweep in one program, compared with the same runs one after the other.

    python -m experiments.benchmarks.sweep [--rates 8] [--seeds 2] [--name tiny]

Both sides are processes as users start them, with start-up, compilation and evaluation, and each
begins with an empty compilation cache: `experiments.sweep` once, then `experiments.pretrain` for
every learning rate and seed. Prints wall seconds and CPU seconds of both, and the differences in
held-out bits per byte (`experiments.benchmarks.rounding` explains why they exceed rounding). About
five minutes on two CPU cores.
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from hnet.bounds import Bounds
from hnet.command_line import parse, run
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.train.metrics_file import read_metrics

MOST_RUNS = 1000


@dataclass(frozen=True)
class SweepBenchmark:
    """Which sweep to time."""

    rates: Annotated[int, Bounds(1, 1000)] = 8
    """number of learning rates"""
    seeds: Annotated[int, Bounds(1, 1000)] = 2
    """number of runs per learning rate"""
    name: str = "tiny"
    """named configuration, as in `pretrain`"""

    def __post_init__(self):
        if (runs := self.rates * self.seeds) > MOST_RUNS:
            raise ConfigError(
                f"rates={self.rates}, seeds={self.seeds}: these are {runs:,} runs, each of which "
                f"is trained twice: use at most {MOST_RUNS:,}"
            )


def main() -> int:
    options = parse(SweepBenchmark)
    rates = learning_rates(options.rates)
    seeds = list(range(options.seeds))
    with tempfile.TemporaryDirectory(prefix="hnet-sweep-") as folder:
        place = Path(folder)
        space = f"[space]\noptim.learning_rate = {rates}\nseed = {seeds}\n"
        (place / "space.toml").write_text(space)
        command = ["experiments.sweep", options.name, "--space", str(place / "space.toml")]
        sweep, said = _timed([[*command, "--out", str(place / "out")]], place / "cache-sweep")
        with (place / "out" / "results.csv").open() as f:
            rows = csv.DictReader(f)
            found = {(float(r["optim.learning_rate"]), int(r["seed"])): r for r in rows}
        folders = {key: place / f"run-{n}" for n, key in enumerate(found)}
        commands = [
            ["experiments.pretrain", options.name, "--workdir", str(workdir),
             "--optim.learning_rate", str(rate), "--seed", str(seed)]
            for (rate, seed), workdir in folders.items()
        ]  # fmt: skip
        separate, _ = _timed(commands, place / "cache-runs")
        differences = [
            abs(float(found[key]["eval/bpb"]) - read_metrics(workdir)[-1]["eval/bpb"])
            for key, workdir in folders.items()
        ]
    programs = [line for line in said.splitlines() if line.startswith("compiled or loaded")]
    print(json_text({
        "runs": len(found),
        "sweep": sweep,
        "separate": separate,
        "wall ratio": round(sweep["wall_seconds"] / separate["wall_seconds"], 3),
        "cpu ratio": round(sweep["cpu_seconds"] / separate["cpu_seconds"], 3),
        "differences of eval/bpb": [float(f"{d:.1e}") for d in sorted(differences)],
        "sweep said": programs[0] if programs else "",
    }, indent=1))  # fmt: skip
    return 0


def learning_rates(count: int) -> list[float]:
    return [float(f"{rate:.4g}") for rate in np.geomspace(1e-3, 1e-2, count)]


def _timed(commands: list[list[str]], cache: Path) -> tuple[dict[str, float], str]:
    """Wall and CPU seconds summed over the processes, and what the last one printed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, text=True, capture_output=True
        )
        if done.returncode:
            raise ConfigError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wall = time.monotonic() - began
    return {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}, done.stdout


if __name__ == "__main__":
    run(main)
