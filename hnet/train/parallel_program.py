"""Many runs as one compiled program: one run mapped over a leading axis, sharded over devices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.data.pipeline import Batch
from hnet.errors import ConfigError
from hnet.train.capacity import CapacitySchedule
from hnet.train.compiled_run import (
    DEVICE_FIELDS,
    CompiledRun,
    Experiment,
    check,
    experiment,
    graphs,
    rows_that_share,
    traced_numbers,
    untraced,
)
from hnet.train.config import Config
from hnet.train.memory import check_memory

AXES = ("runs", "data", "fsdp", "tensor")  # each run is on one device, so the last three are 1


def build(
    configs: Sequence[Config],
    *,
    devices: list | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> CompiledRun:
    """The program of these runs; every array of state, batch and metrics has a leading axis R.

    R is a multiple of the number of devices: the last run is repeated as padding. Raises
    ConfigError unless the runs differ only in traced numbers and seeds.
    """
    if any(untraced(config) != untraced(configs[0]) for config in configs):
        raise ConfigError("these runs differ in more than traced numbers: train them apart")
    devices = jax.devices() if devices is None else devices
    devices = devices[: min(len(devices), len(configs))]
    configs = [*configs, *[configs[-1]] * (-len(configs) % len(devices))]
    grid = np.array(devices).reshape(-1, 1, 1, 1)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    by_run = NamedSharding(mesh, P("runs"))
    check(configs[0], mesh)
    check_memory(configs[0], mesh, runs=len(configs))

    config = configs[0]
    graph, plain_graph, _, kernels = graphs(config, mesh.devices.flat[0])
    rows_sharing_slots = rows_that_share(config, shards=1)
    one = experiment(config, graph, rows_sharing_slots)

    parallel_step, parallel_eval = _over_runs(one, mesh)
    jit = partial(jax.jit, out_shardings=by_run, compiler_options=compiler_options)
    init = jit(jax.vmap(one.init))
    keys = jax.vmap(jax.random.key)(np.asarray([c.seed for c in configs], np.uint32))
    shapes = jax.eval_shape(init, keys)

    def init_all():
        config.model.read_files()
        return init(keys)

    hparams = jax.tree.map(lambda *numbers: np.stack(numbers), *map(traced_numbers, configs))
    hparams = jax.device_put(hparams, by_run)
    evaluate_all = jit(parallel_eval, static_argnames=("capacities",))
    return CompiledRun(
        mesh=mesh,
        shardings=jax.tree.map(lambda _: by_run, shapes),
        hparams=hparams,
        init=init_all,
        step=jit(parallel_step, static_argnames=("capacities",), donate_argnums=0),
        evaluate=lambda params, batch, *, capacities: evaluate_all(
            params, batch, hparams[1], capacities=capacities
        ),
        abstract_state=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_run), shapes
        ),
        graph=plain_graph,
        kernels=kernels,
        ladder=CapacitySchedule.start(
            config.model, config.data.seq_len, rows_sharing_slots, config.train.accumulate
        ),
    )


def _over_runs(one: Experiment, mesh: Mesh) -> tuple[Callable, Callable]:
    """Step and evaluation of one run, mapped over a leading axis of runs."""

    def by_device(function, *specs):
        """Map each device over its own runs, so that kernels see one device."""
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P("runs"), check_vma=False
        )

    def parallel_step(state, batch, hparams, *, capacities):
        step = jax.vmap(partial(one.step, capacities=capacities))
        return by_device(step, *[P("runs")] * 3)(state, batch, hparams)

    def parallel_eval(params, batch, numbers, *, capacities):
        def evaluate(params, batch, numbers):
            return one.evaluate(params, batch, capacities=capacities, numbers=numbers)

        runs = jax.vmap(evaluate, in_axes=(0, None, 0))
        return by_device(runs, P("runs"), P(), P("runs"))(params, batch, numbers)

    return parallel_step, parallel_eval


def put_batches(batches: Sequence[Batch], mesh: Mesh) -> dict[str, jax.Array]:
    """One batch per run, stacked; padding runs get the batch of the last run."""
    batches = [*batches, *[batches[-1]] * (-len(batches) % mesh.shape["runs"])]
    sharding = NamedSharding(mesh, P("runs"))
    return {
        name: jax.device_put(np.stack([batch[name] for batch in batches]), sharding)
        for name in DEVICE_FIELDS
        if name in batches[0]
    }
