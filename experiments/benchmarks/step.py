"""A training step with forced boundaries, and each of its parts, as functions to time in turns.

The router still runs, but a boundary is forced at every 1/fraction-th position, with exactly as
many chunk slots. Each part runs by itself, forward and backward, and is compared with the time that
its operations (`hnet.flops`) would take at the rate of a large float32 matmul in the same process.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import PredictorConfig
from hnet.config import StageConfig
from hnet.flops import total, training_flops
from hnet.loss import next_byte_nll
from hnet.nn.context import Context
from hnet.nn.layers import segment_positions
from hnet.train.compiled_run import build, put_batch
from hnet.train.config import Config
from hnet.train.sharding import batch_sharding

MAIN = "stage1/main_network"


def forced(config: Config, fraction: float) -> Config:
    """The configuration whose predictors have a boundary at each 1/fraction-th position.

    Their probabilities keep their gradient and are moved to the right side of the threshold.
    """
    stages = [
        replace(stage, chunking=replace(stage.chunking, predictor=_by_stride(stage, fraction)))
        for stage in config.model.stages[:-1]
    ]
    model = replace(config.model, stages=(*stages, config.model.stages[-1]))
    return replace(config, model=model)


def _by_stride(stage: StageConfig, fraction: float) -> PredictorConfig:
    own, stride = stage.chunking.predictor, round(1 / fraction)

    class ByStride(own.part):
        def __call__(self, rows):
            p_BL = super().__call__(rows).probability
            cuts_BL = segment_positions(rows.context.segment_ids_BL) % stride == 0
            return Prediction(prob=jnp.where(cuts_BL, 0.75 + 0.2 * p_BL, 0.2 * p_BL))

        def relax(self, logit_BL, config, key):
            return None

    return ByStride.Config(**asdict(own))


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
    """A compiled training step on random bytes, and a compiled forward pass."""

    def __init__(self, config: Config, fraction: float, label: str):
        config = forced(config, fraction)
        self.config, self.fraction, self.label = config, fraction, label
        self.lengths = (config.data.seq_len, *slots(config, fraction))
        program = build(config)
        self.mesh, self.graph, self.state = program.mesh, program.graph, program.init()
        self.batch, self.hparams = put_batch(random_batch(config), program.mesh), program.hparams
        rows_sharing_slots = (
            program.ladder.rows_sharing_slots
        )  # rows that share the slots of a stage
        how = {"capacities": tuple(rows_sharing_slots * n for n in self.lengths[1:])}
        began = time.perf_counter()
        self.step = program.step.lower(self.state, self.batch, self.hparams, **how).compile()
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
        flops = total(training_flops(self.config.model, self.lengths)) * data.batch_size
        num_bytes = data.batch_size * data.seq_len
        return {
            "what": self.label,
            "fraction": self.fraction,
            "batch": [data.batch_size, data.seq_len],
            "mflops_per_byte": flops / num_bytes / 1e6,
            "bytes_per_sec": num_bytes / seconds,
            "bytes_per_sec_over_gflops": num_bytes / seconds / gflops,
            "achieved_over_matmul": flops / seconds / 1e9 / gflops,
            "forward_bytes_per_sec": num_bytes / forward_seconds,
            "compile_seconds": self.compile_seconds,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
            "argument_mb": memory.argument_size_in_bytes / 1e6,
        }


def part_functions(step: Step) -> dict[str, tuple[Callable, tuple]]:
    """Each part of stage 0, the main network, and the loss, with inputs of the real shapes."""
    context = Context(step.batch["segment_ids"])
    params = jax.tree.map(jnp.copy, step.state.params)  # a step donates its own
    model = nnx.merge(step.graph, params)
    stage, slots = model.backbone, step.lengths[1:]

    def of_module(module, call):
        graph, params = nnx.split(module)
        return lambda params, *inputs: call(nnx.merge(graph, params), *inputs), params

    def cut(stage, h_BLD):
        return stage.boundaries(h_BLD, context, slots[0])

    def rows_apart(arrays):  # as they are laid out in the step
        return jax.device_put(arrays, batch_sharding(step.mesh))

    x_BLD = rows_apart(model.embeddings(step.batch["input_ids"], context))
    h_BLD = rows_apart(stage.encoder(x_BLD, context))
    decided = rows_apart(cut(stage, h_BLD))
    x_BMD, inner_context, opened = rows_apart(stage.chunk(h_BLD, context, decided, slots[0]))
    y_BMD = rows_apart(stage.main_network(x_BMD, inner_context, slots[1:])[0])
    y_BMD = y_BMD[..., : stage.d_read]
    stack = lambda stack, x: stack(x, context)
    inner = lambda net, x: net(x, inner_context, slots[1:])[0]
    modules = {
        "stage0/encoder": (stage.encoder, stack, h_BLD),
        "stage0/routing_module": (stage, lambda s, h: cut(s, h).boundary_prob_BL, h_BLD),
        MAIN: (stage.main_network, inner, x_BMD),
        "stage0/decoder": (stage.decoder, stack, h_BLD),
    }
    found = {}
    for name, (module, call, x) in modules.items():
        f, params = of_module(module, call)
        found[name] = f, (params, x)
    found["stage0/chunk"] = lambda h: stage.chunk(h, context, decided, slots[0])[0], (h_BLD,)

    def dechunk(y_BMD, p_BM, c_BL):
        own = opened._replace(boundary_prob_BM=p_BM)
        boundaries = decided._replace(boundary_prob_BL=c_BL)
        return stage.dechunk_layer(y_BMD, boundaries, own, stage.chunking.dechunk)

    probabilities = opened.boundary_prob_BM, decided.boundary_prob_BL
    found["stage0/dechunk"] = dechunk, (y_BMD, *probabilities)
    if stage.residual_proj is not None:
        f, params = of_module(stage.residual_proj, lambda layer, h: layer(h))
        found["stage0/residual_proj"] = f, (params, h_BLD)
    head, params = of_module(
        model, lambda m, x: next_byte_nll(m.logits(x), step.batch["input_ids"])
    )
    found["lm_head"] = head, (params, x_BLD)
    return found


def compiled_parts(step: Step, only: tuple[str, ...] = ()) -> dict[str, Callable[[], Any]]:
    """Each part forward and backward, as a function to time; only those named in `only`, if any."""

    def timed(f, inputs):
        def both(*inputs):
            out, pull = jax.vjp(f, *inputs)
            return pull(out)

        compiled = jax.jit(both).lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    parts = part_functions(step)
    return {name: timed(*parts[name]) for name in only or parts}


def matmul_seconds(size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A large float32 matmul to time, and its number of operations."""
    a = jnp.ones((size, size), jnp.float32)
    f = jax.jit(lambda a: a @ a)
    return lambda: jax.block_until_ready(f(a)), 2.0 * size**3


def medians(functions: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each, interleaved; the first round does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_steps(steps: list[Step], repeats: int, parts_of: Step | None = None) -> dict[str, Any]:
    """Figures of all steps, and of the parts of one, with the matmul rate measured alongside."""
    matmul, operations = matmul_seconds()
    functions: dict[Any, Callable[[], Any]] = {"matmul": matmul}
    for i, step in enumerate(steps):
        functions |= {("step", i): step.run, ("forward", i): step.forward}
    if parts_of:  # all parts of this step; of the others the part that must scale with chunks
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
        model = parts_of.config.model
        rows, ideal = parts_of.config.data.batch_size, training_flops(model, parts_of.lengths)
        parts = {n[1]: s for n, s in seconds.items() if n[0] == "part"}
        found["parts"] = [
            {
                "part": name,
                "ms": 1e3 * s,
                "share_of_step": s / whole,
                "ms_at_matmul_rate": 1e-6 * rows * ideal[name].total / gflops,
            }
            for name, s in parts.items()
        ]
        cuts = ("stage0/routing_module", "stage0/chunk", "stage0/dechunk")
        found["routing_chunk_dechunk_share"] = sum(parts[name] for name in cuts) / whole
        found["parts_over_step"] = sum(parts.values()) / whole
    return found
