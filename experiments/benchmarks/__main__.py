"""How fast training is, and what bounds it.

    python -m experiments.benchmarks [--fractions 1 0.5] [--lengths 2048 32768] [--json FILE]
    python -m experiments.benchmarks --config default --compare reference --measure step
    python -m experiments.benchmarks --measure pretrain decode [--decode.batches 1 32]

All figures are medians over interleaved repeats. The rate of a large float32 matmul in the same
process is printed for comparison: machines differ, ratios less. `step` and `parts` force boundaries
at given fractions of the positions (`step.py`); `lengths` trains one row per device, with
windowed outer layers around a main network with full attention; `pretrain` alternates with its bare
step (`pretrain.py`); `decode` is `decode.py`. About 8 minutes on two CPU cores, most
of it compilation.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Annotated, Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import decode as benchmark_decode
from experiments.benchmarks.decode import DecodeBenchmark
from experiments.benchmarks.input import delivered
from experiments.benchmarks.pretrain import measure_pretrain
from experiments.benchmarks.step import Step, measure_steps
from hnet.bounds import Bounds, FilePath, Repeats, RowLength, Rows
from hnet.command_line import parse, run
from hnet.data import open_corpus, train_batches
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.outputs import new_file, write_new
from hnet.runtime.cpu import keep_freed_memory, one_device_per_core
from hnet.train.config import Config
from hnet.train.named import base_config

Measure = Literal["step", "parts", "lengths", "pretrain", "input", "decode"]


@dataclass(frozen=True)
class Benchmark:
    """What to measure and how often."""

    config: str = ""
    """named configuration or JSON file; empty = ["m2", ["T4"], "m2"], d_model 128/256"""
    compare: str = ""
    """second configuration, whose steps alternate with those of the first"""
    measure: tuple[Measure, ...] = ("step", "parts", "lengths", "input")
    """measurements: training step and forward pass; parts of the step; long rows; pretrain with all
    its logging; the input pipeline by itself; decoding"""
    fractions: tuple[Annotated[float, Bounds(above=0, most=1)], ...] = (1.0, 0.5, 0.25, 0.125)
    """chunks per position; parts are measured at the second fraction, or at the only one"""
    lengths: tuple[RowLength, ...] = (512, 2048, 8192, 32768)
    """bytes per row, for `lengths`"""
    batch_size: Rows = 8
    """rows per step"""
    seq_len: RowLength = 512
    """bytes per row"""
    repeats: Repeats = 7
    """number of interleaved measurements, of everything but decoding"""
    decode: DecodeBenchmark = DecodeBenchmark()
    """settings of the decoding benchmark, which has its own network"""
    json: FilePath | None = None
    """output file for all figures"""

    def __post_init__(self):
        if bad := [f for f in self.fractions if round(1 / f) != 1 / f or 1 / f > self.seq_len]:
            raise ConfigError(
                f"fractions={self.fractions}: {bad[0]} is not 1 / a whole number up to seq_len="
                f"{self.seq_len}"
            )
        if not self.fractions or not self.lengths:
            raise ConfigError(
                f"fractions={self.fractions}, lengths={self.lengths}: give at least one of each"
            )


def measured_config(name: str, batch_size: int, seq_len: int) -> Config:
    """A named configuration with this batch shape; without a name, the default network above."""
    base = base_config(name or "default")
    if not name:
        outer, main = base.model.stages
        model = replace(base.model, stages=(outer, replace(main, d_intermediate=704)))
        base = replace(base, model=model)
    return replace(base, data=replace(base.data, batch_size=batch_size, seq_len=seq_len))


def long_row(length: int) -> Config:
    """One row per device: windowed attention and Mamba-2 outside, full attention inside."""
    base = measured_config("", len(jax.devices()), length)
    outer, main = base.model.stages
    outer = replace(outer, arch_layout=("m1t1", "t1m1"), window_size=127)
    return replace(base, model=replace(base.model, stages=(outer, main)))


def measure_input(config: Config, seconds: float = 2.0) -> dict[str, float]:
    """Source bytes per second of the input pipeline by itself."""
    with train_batches(open_corpus(config.data), config.data, seed=0) as batches:
        next(batches)  # starts the workers
        return {"bytes_per_sec": delivered(batches, seconds)}


def measure_decode(config: DecodeBenchmark) -> dict[str, Any]:
    """`decode.py`; on CPUs in a separate process, where one device has all cores."""
    if jax.default_backend() != "cpu":
        return benchmark_decode.measure(config)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=keep_freed_memory) as process:
        return process.submit(benchmark_decode.measure, config).result()


def measure(config: Benchmark) -> dict[str, Any]:
    """All figures, as plain JSON content."""
    names = [config.config] + [config.compare] * bool(config.compare)
    named = {name: measured_config(name, config.batch_size, config.seq_len) for name in names}
    base = named[config.config]
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    if {"step", "parts"} & set(config.measure):
        steps = [
            Step(named[name], f, name or "this network") for f in config.fractions for name in names
        ]
        chosen = steps[len(names)] if len(config.fractions) > 1 else steps[0]
        with_parts = "parts" in config.measure and base.model.num_chunked
        found |= measure_steps(steps, config.repeats, chosen if with_parts else None)
    if "lengths" in config.measure:
        rows = [Step(long_row(n), 1 / 8, f"{n} bytes") for n in config.lengths]
        found["lengths"] = measure_steps(rows, min(config.repeats, 3))
    if "input" in config.measure:
        found["input"] = measure_input(base)
    if "pretrain" in config.measure:
        found["pretrain"] = measure_pretrain(base, config.repeats)
    if "decode" in config.measure:
        found["decode"] = measure_decode(config.decode)
    return found


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, width=150)
    lengths = found.get("lengths")
    for title, part in (("training step", found), ("long rows", lengths)):
        if not part or "steps" not in part:
            continue
        console.print(f"{title}; large matmul {part['matmul_gflops']:.0f} GFLOP/s")
        table = Table(
            "what", "fraction", "MFLOP per byte", "bytes/s", "over GFLOP/s", "of matmul rate",
            "main network ms", "forward bytes/s", "compile s", "temp MB per device", box=None,
        )  # fmt: skip
        for row in part["steps"]:
            table.add_row(
                row["what"], f"{row['fraction']:g}", f"{row['mflops_per_byte']:.2f}",
                f"{row['bytes_per_sec']:,.0f}", f"{row['bytes_per_sec_over_gflops']:.1f}",
                f"{row['achieved_over_matmul']:.2f}", f"{row.get('main_network_ms', 0):.0f}",
                f"{row['forward_bytes_per_sec']:,.0f}", f"{row['compile_seconds']:.1f}",
                f"{row['temp_mb']:,.0f}",
            )  # fmt: skip
        console.print(table)
    if "parts" in found:
        table = Table("part, both ways", "ms", "of the step", "ms at matmul rate", box=None)
        for row in found["parts"]:
            table.add_row(
                row["part"], f"{row['ms']:.1f}", f"{row['share_of_step']:.1%}",
                f"{row['ms_at_matmul_rate']:.1f}",
            )  # fmt: skip
        console.print(table)
        share, whole = found["routing_chunk_dechunk_share"], found["parts_over_step"]
        console.print(f"routing, chunk and dechunk {share:.1%}; all parts {whole:.0%} of the step")
    if "input" in found:
        console.print(f"input only {found['input']['bytes_per_sec']:,.0f} bytes/s")
    if row := found.get("pretrain"):
        console.print(
            f"pretrain {row['bytes_per_sec']:,.0f} bytes/s, {row['over_bare_step']:.1%} of the "
            f"bare step's {row['bare_step']:,.0f} (turns from {row['lowest_turn']:.1%} to "
            f"{row['highest_turn']:.1%})"
        )
    if "decode" in found:
        benchmark_decode.show(found["decode"], console)


def main() -> None:
    config = parse(Benchmark)
    if config.json is not None:
        new_file(config.json, "json")
    one_device_per_core(config.batch_size)
    found = measure(config)
    show(found)
    if config.json is not None:
        write_new(config.json, json_text(found, indent=1) + "\n", "json")


if __name__ == "__main__":
    run(main, trains=True)
