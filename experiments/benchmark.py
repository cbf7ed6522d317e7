"""How fast training is, and what bounds it.

    python -m experiments.benchmark [--fractions 1 0.5] [--lengths 2048 32768] [--json FILE]
    python -m experiments.benchmark --config default --compare reference --measure step
    python -m experiments.benchmark --measure pretrain

All figures are medians of repeats that take turns, beside the rate of a large float32 matmul in the
same process: machines differ, ratios less. The router is kept, but where it cuts is forced to
every 1/fraction-th position, with exactly as many chunk slots. `parts` runs each part alone,
forward and backward, beside the time that its operations (`hnet.flops`) would take at the rate of
the matmul. `lengths` trains one row a device, with windowed outer layers around a main network with
full attention. For decoding: `python -m experiments.benchmark_decode`. On two CPU cores about 8
minutes, most of them compilation.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.command_line import base_config, parse, run
from hnet.chunking.dechunk import dechunk
from hnet.chunking.router import decide
from hnet.config import ConfigError
from hnet.data import Corpus, open_corpus, train_batches
from hnet.flops import flops_by_part, forward_terms, training_flops
from hnet.loss import next_byte_nll
from hnet.nn.layers import segment_positions
from hnet.train import loop
from hnet.train.config import Config
from hnet.train.cpu import one_device_a_core
from hnet.train.distributed import StopRequest
from hnet.train.program import build, put_batch
from hnet.train.report import Report
from hnet.train.sharding import batch_sharding

Measure = Literal["step", "parts", "lengths", "pretrain", "input"]


@dataclass(frozen=True)
class Benchmark:
    """What to measure and how often."""

    config: str = ""
    """a named configuration or a JSON file; empty = ["m2", ["T4"], "m2"], d_model 128/256"""
    compare: str = ""
    """another configuration, whose steps take turns with those of the first"""
    measure: tuple[Measure, ...] = ("step", "parts", "lengths", "input")
    """step and forward; its parts; long rows; pretrain with all its logging; the input alone"""
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    """chunks a position; the parts are those of the second, or of the only one"""
    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    """bytes a row of `lengths`"""
    batch_size: int = 8
    """rows of a step"""
    seq_len: int = 512
    """bytes a row"""
    repeats: int = 7
    """measurements of everything, in turns"""
    json: str = ""
    """file for all figures"""

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value}: use 1 or more")
        if bad := [f for f in self.fractions if not 0 < f <= 1 or round(1 / f) != 1 / f]:
            raise ConfigError(f"fractions={self.fractions}: {bad[0]} is not 1 / a whole number")
        if not self.fractions or min(self.lengths, default=0) < 8:
            raise ConfigError(
                f"fractions={self.fractions}, lengths={self.lengths}: give at least one of each, "
                "and rows of 8 bytes or more"
            )


def measured_config(name: str, batch_size: int, seq_len: int) -> Config:
    """A named configuration with one shape of batch; the one of the README without a name."""
    base = base_config(name or "default")
    if not name:
        outer, main = base.model.stages
        model = replace(base.model, stages=(outer, replace(main, d_intermediate=704)))
        base = replace(base, model=model)
    return replace(base, data=replace(base.data, batch_size=batch_size, seq_len=seq_len))


def long_row(length: int) -> Config:
    """A row a device: windowed attention beside Mamba-2 outside, full attention inside."""
    base = measured_config("", len(jax.devices()), length)
    outer, main = base.model.stages
    outer = replace(outer, arch_layout=("m1t1", "t1m1"), window_size=127)
    return replace(base, model=replace(base.model, stages=(outer, main)))


def forced(fraction: float) -> Any:
    """While it is entered, every router that is traced cuts at each 1/fraction-th position.

    Its probabilities keep their gradient and are moved to the right side of the threshold.
    """

    def decide_by_stride(p_BL, segment_ids_BL, capacity, **how):
        cuts_BL = segment_positions(segment_ids_BL) % round(1 / fraction) == 0
        p_BL = jnp.where(cuts_BL, 0.75 + 0.2 * p_BL, 0.2 * p_BL)
        return decide(p_BL, segment_ids_BL, capacity, **{**how, "compared_BL": None})

    return mock.patch("hnet.stage.decide", decide_by_stride)


def slots(config: Config, fraction: float) -> tuple[int, ...]:
    lengths = [config.data.seq_len]
    for _ in config.model.stages[:-1]:
        lengths.append(-(-lengths[-1] // round(1 / fraction)))
    return tuple(lengths[1:])


def random_batch(config: Config) -> dict[str, np.ndarray]:
    shape = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, 254, shape).astype(np.int32)
    return {"input_ids": ids, "segment_ids": np.ones(shape, np.int32), "loss_mask": ids >= 0}


class Step:
    """A compiled training step of random bytes, and the forward pass alone."""

    def __init__(self, config: Config, fraction: float, label: str):
        self.config, self.fraction, self.label = config, fraction, label
        self.lengths = (config.data.seq_len, *slots(config, fraction))
        program = build(config)
        self.mesh, self.graph, self.state = program.mesh, program.graph, program.init()
        self.batch, self.hparams = put_batch(random_batch(config), program.mesh), program.hparams
        packed_rows = program.ladder.packed_rows  # share the slots of a stage
        how = {"capacities": tuple(packed_rows * n for n in self.lengths[1:])}
        with forced(fraction):
            began = time.perf_counter()
            lowered = program.step.lower(self.state, self.batch, self.hparams, **how)
            self.step = lowered.compile()
            self.compile_seconds = time.perf_counter() - began
            self.evaluate = program.evaluate.lower(self.state.params, self.batch, **how).compile()

        metrics = self.run()
        for s in range(config.model.num_chunked):
            cut, clipped = metrics[f"stage{s}/boundary_rate"], metrics[f"stage{s}/overflow_frac"]
            if clipped or abs(cut - fraction) > 0.01:
                raise RuntimeError(f"stage {s} cuts {cut:.3f} and clips {clipped:.3f} of it")

    def run(self) -> dict[str, jax.Array]:
        results = self.step(self.state, self.batch, self.hparams)
        self.state, metrics = jax.block_until_ready(results)
        return metrics

    def forward(self) -> None:
        jax.block_until_ready(self.evaluate(self.state.params, self.batch))

    def figures(self, seconds: float, forward_seconds: float, gflops: float) -> dict[str, Any]:
        data, memory = self.config.data, self.step.memory_analysis()
        terms = forward_terms(self.config.model, self.lengths)
        flops = training_flops(terms, self.config.model.compute.remat) * data.batch_size
        num_bytes = data.batch_size * data.seq_len
        return {
            "what": self.label,
            "fraction": self.fraction,
            "batch": [data.batch_size, data.seq_len],
            "mflops_a_byte": flops / num_bytes / 1e6,
            "bytes_per_sec": num_bytes / seconds,
            "bytes_per_sec_over_gflops": num_bytes / seconds / gflops,
            "achieved_over_matmul": flops / seconds / 1e9 / gflops,
            "forward_bytes_per_sec": num_bytes / forward_seconds,
            "compile_seconds": self.compile_seconds,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
            "argument_mb": memory.argument_size_in_bytes / 1e6,
        }


def part_functions(step: Step) -> dict[str, tuple[Callable, tuple]]:
    """Each part of stage 0, the network inside it, and the loss, with inputs of the real shapes."""
    config, segment_ids_BL = step.config, step.batch["segment_ids"]
    params = jax.tree.map(jnp.copy, step.state.params)  # a step gives its own away
    model = nnx.merge(step.graph, params)
    stage, slots = model.backbone, step.lengths[1:]

    def of_module(module, call):
        graph, params = nnx.split(module)
        return lambda params, *inputs: call(nnx.merge(graph, params), *inputs), params

    def route(stage, h_BLD):
        return stage.route(h_BLD, segment_ids_BL, slots[0])

    def rows_apart(arrays):  # as they lie in the step
        return jax.device_put(arrays, batch_sharding(step.mesh))

    x_BLD = rows_apart(model.embeddings(step.batch["input_ids"]))
    h_BLD = rows_apart(stage.encoder(x_BLD, segment_ids_BL))
    decided = rows_apart(route(stage, h_BLD))
    chunks = rows_apart(stage.chunk(h_BLD, decided, slots[0]))
    y_BMD = rows_apart(stage.main_network(chunks.x_BMD, chunks.segment_ids_BM, slots[1:])[0])
    how = config.model.stages[0].chunking.dechunk
    stack = lambda stack, x: stack(x, segment_ids_BL)
    inner = lambda net, x: net(x, chunks.segment_ids_BM, slots[1:])[0]
    modules = {
        "stage0/encoder": (stage.encoder, stack, h_BLD),
        "stage0/routing": (stage, lambda s, h: route(s, h).boundary_prob_BL, h_BLD),
        MAIN: (stage.main_network, inner, chunks.x_BMD),
        "stage0/decoder": (stage.decoder, stack, h_BLD),
    }
    found = {}
    for name, (module, call, x) in modules.items():
        f, params = of_module(module, call)
        found[name] = f, (params, x)
    found["stage0/chunk"] = lambda h: stage.chunk(h, decided, slots[0]).x_BMD, (h_BLD,)

    def smooth(y_BMD, p_BM, c_BL):
        own = chunks._replace(boundary_prob_BM=p_BM)
        return dechunk(y_BMD, own, decided._replace(boundary_prob_BL=c_BL), how)

    probabilities = chunks.boundary_prob_BM, decided.boundary_prob_BL
    found["stage0/dechunk"] = smooth, (y_BMD, *probabilities)
    if stage.residual_proj is not None:
        f, params = of_module(stage.residual_proj, lambda layer, h: layer(h))
        found["stage0/residual_proj"] = f, (params, h_BLD)
    head, params = of_module(
        model, lambda m, x: next_byte_nll(m.logits(x), step.batch["input_ids"])
    )
    found["head"] = head, (params, x_BLD)
    return found


MAIN = "stage1/main_network"


def compiled_parts(step: Step, only: tuple[str, ...] = ()) -> dict[str, Callable[[], Any]]:
    """Each part forward and backward, as something to time; some of them if named."""

    def timed(f, inputs):
        def both(*inputs):
            out, pull = jax.vjp(f, *inputs)
            return pull(out)

        compiled = jax.jit(both).lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    with forced(step.fraction):
        parts = part_functions(step)
        return {name: timed(*parts[name]) for name in only or parts}


def matmul_seconds(size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A large float32 matmul to time, and its operations."""
    a = jnp.ones((size, size), jnp.float32)
    f = jax.jit(lambda a: a @ a)
    return lambda: jax.block_until_ready(f(a)), 2.0 * size**3


def medians(functions: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each, taking turns; the first turn does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_steps(steps: list[Step], repeats: int, parts_of: Step | None = None) -> dict[str, Any]:
    """Figures of all steps, and of the parts of one, at the matmul rate of the same minutes."""
    matmul, operations = matmul_seconds()
    functions: dict[Any, Callable[[], Any]] = {"matmul": matmul}
    for i, step in enumerate(steps):
        functions |= {("step", i): step.run, ("forward", i): step.forward}
    if parts_of:  # of one step all, of the others the one that has to follow the compression
        functions |= {("part", name): f for name, f in compiled_parts(parts_of).items()}
        for i, step in enumerate(steps):
            functions[("main", i)] = (
                functions["part", MAIN] if step is parts_of else compiled_parts(step, (MAIN,))[MAIN]
            )
    seconds = medians(functions, repeats)
    gflops = operations / seconds["matmul"] / 1e9
    found: dict[str, Any] = {"matmul_gflops": gflops}
    found["steps"] = [
        step.figures(seconds["step", i], seconds["forward", i], gflops)
        for i, step in enumerate(steps)
    ]
    if parts_of:
        for i, row in enumerate(found["steps"]):
            row["main_network_ms"] = 1e3 * seconds["main", i]
        whole = seconds["step", steps.index(parts_of)]
        terms = forward_terms(parts_of.config.model, parts_of.lengths)
        rows, ideal = parts_of.config.data.batch_size, flops_by_part(terms)
        parts = {n[1]: s for n, s in seconds.items() if n[0] == "part"}
        found["parts"] = [
            {
                "part": name,
                "ms": 1e3 * s,
                "share_of_step": s / whole,
                "ms_at_matmul_rate": 3e-6 * rows * ideal.get(name, 0.0) / gflops,
            }
            for name, s in parts.items()
        ]
        cuts = ("stage0/routing", "stage0/chunk", "stage0/dechunk")
        found["routing_chunk_dechunk_share"] = sum(parts[name] for name in cuts) / whole
        found["parts_over_step"] = sum(parts.values()) / whole
    return found


class PacedReport(Report):
    """A report that times the steps of a run, and has bare steps take turns with them.

    Once the slots have settled it stops the run after every `turn` steps for as many bare steps:
    the same program on a state of its own, without input, metrics, log or files.
    """

    def __init__(self, config: Config, corpus: Corpus, start_step: int, *, settled: int, turn: int):
        super().__init__(config, corpus, start_step)
        self.settled, self.turn = settled, turn
        self.bare, self.seconds = None, {"run": [], "bare": []}
        self.steps, self.capacities = [], None

    def step(self, row: dict[str, Any]) -> list[str]:
        capacities = tuple(row[f"stage{s}/capacity"] for s in range(self.config.model.num_chunked))
        alarms = super().step(row)
        self.steps.append(time.perf_counter())
        if row["step"] <= self.settled or capacities != self.capacities:
            self.capacities, self.steps = capacities, []
        elif len(self.steps) > self.turn + 1:  # the first began before the run went on
            self.seconds["run"].append((self.steps[-1] - self.steps[1]) / (len(self.steps) - 2))
            self._take_turn()
            self.steps = []
        return alarms

    def _take_turn(self) -> None:
        if not self.bare or self.bare[0] != self.capacities:
            program = build(self.config)
            state, batch = program.init(), put_batch(random_batch(self.config), program.mesh)
            lowered = program.step.lower(state, batch, program.hparams, capacities=self.capacities)
            self.bare = self.capacities, lowered.compile(), batch, program.hparams, state
        _, step, batch, hparams, state = self.bare
        seconds = []
        for repeat in range(self.turn + 1):  # the first waits for the step of the run in flight
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, hparams))
            seconds += [time.perf_counter() - began] * (repeat > 0)
        self.bare = *self.bare[:-1], state
        self.seconds["bare"].append(statistics.fmean(seconds))


def measure_pretrain(config: Config, turns: int) -> dict[str, float]:
    """Bytes a second of `pretrain` with input, logging and metrics, over those of the bare step."""
    settled, turn = 100, 10
    reports = []

    def make_report(*args):
        reports.append(PacedReport(*args, settled=settled, turn=turn))
        return reports[0]

    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            workdir=folder,
            train=replace(config.train, steps=settled + turns * (turn + 2) + 1),
            eval=replace(config.eval, every=0, max_bytes=1024),
            checkpoint=replace(config.checkpoint, every=0),
        )
        with StopRequest() as stop:
            loop.train(config, stop, make_report)
    seconds = reports[0].seconds
    if not seconds["bare"]:
        raise RuntimeError(f"the chunk slots did not settle within {config.train.steps} steps")
    ratios = [bare / run for run, bare in zip(seconds["run"], seconds["bare"])]
    per_batch = config.data.batch_size * config.data.seq_len
    return {
        "bytes_per_sec": per_batch / statistics.median(seconds["run"]),
        "bare_step": per_batch / statistics.median(seconds["bare"]),
        "over_bare_step": statistics.median(ratios),
        "lowest_turn": min(ratios),
        "highest_turn": max(ratios),
    }


def measure_input(config: Config, batches: int = 200) -> dict[str, float]:
    """Bytes a second of the input pipeline alone."""
    batches_of = train_batches(open_corpus(config.data), config.data, seed=0, start=0)
    next(batches_of)
    began = time.perf_counter()
    for _ in range(batches):
        next(batches_of)
    per_batch = config.data.batch_size * config.data.seq_len
    return {"bytes_per_sec": batches * per_batch / (time.perf_counter() - began)}


def measure(config: Benchmark) -> dict[str, Any]:
    """All figures, as plain JSON content."""
    base = measured_config(config.config, config.batch_size, config.seq_len)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    if {"step", "parts"} & set(config.measure):
        names = [config.config] + [config.compare] * bool(config.compare)
        steps = [
            Step(
                measured_config(name, config.batch_size, config.seq_len), f, name or "this network"
            )
            for f in config.fractions
            for name in names
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
    return found


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, width=150)
    lengths = found.get("lengths")
    for title, part in (("training step", found), ("long rows", lengths)):
        if not part or "steps" not in part:
            continue
        console.print(f"{title}; large matmul {part['matmul_gflops']:.0f} GFLOP/s")
        table = Table(
            "what", "fraction", "MFLOP a byte", "bytes/s", "over GFLOP/s", "of matmul rate",
            "main network ms", "forward bytes/s", "compile s", "temp MB a device", box=None,
        )  # fmt: skip
        for row in part["steps"]:
            table.add_row(
                row["what"], f"{row['fraction']:g}", f"{row['mflops_a_byte']:.2f}",
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
        console.print(f"input alone {found['input']['bytes_per_sec']:,.0f} bytes/s")
    if row := found.get("pretrain"):
        console.print(
            f"pretrain {row['bytes_per_sec']:,.0f} bytes/s, {row['over_bare_step']:.1%} of the "
            f"bare step's {row['bare_step']:,.0f} (turns from {row['lowest_turn']:.1%} to "
            f"{row['highest_turn']:.1%})"
        )


def main() -> None:
    config = parse(Benchmark)
    one_device_a_core(config.batch_size)
    found = measure(config)
    show(found)
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
