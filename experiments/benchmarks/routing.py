"""What one router per script costs, compared with a single router.

    python -m experiments.benchmarks.routing [--routes 16] [--config mixed_scripts_single]

Times the router of stage 0 by itself, forward and backward, and the whole training step, with one
route and with many, interleaved, on all devices (on a CPU one per core, as in training). The route
of a row changes every `run` bytes. About 2 minutes on two cores.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.step import random_batch
from hnet.bounds import Bounds, Count, Repeats
from hnet.chunking.part import Place, Positions
from hnet.command_line import parse, run
from hnet.config import StageConfig
from hnet.data.scripts import SCRIPTS
from hnet.errors import ConfigError
from hnet.nn.context import Context
from hnet.runtime.cpu import one_device_per_core
from hnet.stage import make_predictor
from hnet.train.compiled_run import CompiledRun, build, on_mesh, put_batch
from hnet.train.config import Config
from hnet.train.named import base_config
from hnet.train.sharding import replicated

BYTES_PER_CHUNK = 4  # sets the chunk slots of a step


@dataclass(frozen=True)
class RoutingBenchmark:
    """What to measure and how often."""

    config: str = "mixed_scripts_single"
    """named configuration or JSON file, with one route"""
    routes: Annotated[int, Bounds(2, 1000)] = 16
    """number of routes to compare with"""
    run: Count = 32
    """number of consecutive positions with the same route"""
    rows: Annotated[int, Bounds(0, 65536)] = 0
    """rows per batch; 0 = as configured"""
    repeats: Repeats = 15
    """number of interleaved measurements"""


def main() -> None:
    options = parse(RoutingBenchmark)
    base = base_config(options.config)
    if base.model.num_routes > 1 or not base.model.num_chunked:
        raise ConfigError(f"config={options.config!r}: give one that cuts, with one route")
    rows = options.rows or base.data.batch_size
    one_device_per_core(rows)
    base, calls = replace(base, data=replace(base.data, batch_size=rows)), {}
    for routes in 1, options.routes:
        config = with_routes(base, routes)
        program, batch = build(config), routed_batch(config, routes, options.run)
        fed = put_batch(batch, program.mesh)
        calls["router", routes] = router_call(config.model.stages[0], fed, program.mesh, routes)
        calls["training step", routes] = step_call(program, config, fed)
    times = {key: [] for key in calls}
    for repeat in range(options.repeats + 1):  # the first one compiles
        for key, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                times[key].append(time.perf_counter() - began)
    table = Table("what", "1 route", f"{options.routes} routes", "ratio", box=None)
    for what in "router", "training step":
        one, many = (1e3 * statistics.median(times[what, r]) for r in (1, options.routes))
        table.add_row(what, f"{one:.2f} ms", f"{many:.2f} ms", f"{many / one:.2f}")
    Console(highlight=False).print(table)


def with_routes(base: Config, routes: int) -> Config:
    """The configuration with that many routes in stage 0, one script each."""
    outer, *inner = base.model.stages
    outer = replace(outer, chunking=replace(outer.chunking, routes=routes))
    groups = tuple((name,) for name in SCRIPTS[2 : routes + 1]) if routes > 1 else ()
    return replace(base, model=replace(base.model, stages=(outer, *inner), route_groups=groups))


def routed_batch(config: Config, routes: int, run: int) -> dict[str, np.ndarray]:
    """Random bytes whose route changes every `run` bytes."""
    rng, (rows, length) = np.random.default_rng(0), (config.data.batch_size, config.data.seq_len)
    runs = rng.integers(0, routes, (rows, -(-length // run))).astype(np.int32)
    return {
        **random_batch(config),
        "route_ids": np.repeat(runs, min(run, length), axis=1)[:, :length],
    }


def router_call(
    stage: StageConfig, fed: dict[str, jax.Array], mesh: jax.sharding.Mesh, routes: int
) -> Callable:
    """Value of the sum of a stage's probabilities, and its gradients by parameters and states."""
    place = Place(0, stage.d_model, stage.d_model, stage.chunking)
    predictor = make_predictor(stage.chunking, place, rngs=nnx.Rngs(0))
    graph, params = nnx.split(predictor)
    rng, route_ids_BL = np.random.default_rng(1), fed["route_ids"]
    x_BLD = rng.normal(size=(*route_ids_BL.shape, stage.d_model)).astype(np.float32)
    x_BLD = jax.device_put(x_BLD, route_ids_BL.sharding)
    params = jax.device_put(params, replicated(mesh))
    ones_BL = jnp.ones_like(route_ids_BL)

    @jax.jit
    @partial(on_mesh, mesh=mesh)
    def both(params, x_BLD, route_ids_BL):
        def total(params, x_BLD):
            context = Context(ones_BL, route_ids_BL=route_ids_BL if routes > 1 else None)
            rows = Positions(x_BLD, context, stage.chunking.predictor)
            return jnp.sum(nnx.merge(graph, params)(rows).probability)

        return jax.value_and_grad(total, (0, 1))(params, x_BLD)

    return lambda: both(params, x_BLD, route_ids_BL)


def step_call(program: CompiledRun, config: Config, fed: dict[str, jax.Array]) -> Callable:
    """One update after the other."""
    state = program.init()
    slots = program.ladder.rows_sharing_slots * config.data.seq_len // BYTES_PER_CHUNK

    def call():
        nonlocal state
        capacities = (slots,) * config.model.num_chunked
        state, metrics = program.step(state, fed, program.hparams, capacities=capacities)
        return metrics

    return call


if __name__ == "__main__":
    run(main, trains=True)
