"""The compiled side of a run: what is jitted, with which shardings and which traced numbers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from flax import nnx

from hnet.data import eval_batches
from hnet.data.pipeline import Batch
from hnet.data.tokens import read_vocabulary
from hnet.errors import ConfigError
from hnet.inspect.tags import without_folders
from hnet.model import abstract, init_params
from hnet.nn.kernels.table import described, resolved, without
from hnet.nn.parameters import describe
from hnet.stage import Numbers
from hnet.train.capacity import Ladder
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation, evaluate
from hnet.train.optim import Hyperparams
from hnet.train.sharding import (
    batch_sharding,
    check_batch,
    make_mesh,
    replicated,
    state_shardings,
)
from hnet.train.step import TrainState, eval_step, init_state, train_step


@dataclass(frozen=True)
class Experiment:
    """A run as pure functions of pytrees: nothing is jitted, sharded or donated yet.

    `build` compiles it for a mesh, `population.build` several in one program. Whoever wants another
    step, loss or state replaces functions (`Change`); state and batch are theirs to define, as long
    as the state is a `TrainState` with its five first fields.
    """

    init: Callable[[jax.Array], TrainState]
    """key -> state"""
    step: Callable[..., tuple[TrainState, dict]]
    """(state, batch, numbers, capacities=...) -> (state, metrics)"""
    evaluate: Callable[..., dict]
    """(parameters, batch, capacities=...) -> metrics"""
    numbers: Any
    """traced numbers: what a sweep may vary without compiling"""
    graph: Any
    """structure of the model: ``nnx.merge(graph, state.params)``"""


Change = Callable[[Experiment], Experiment]
"""What a researcher puts in place of some functions of a run."""


@dataclass(frozen=True)
class Program:
    """Jitted pure functions of a run and where their arguments live."""

    mesh: jax.sharding.Mesh
    shardings: Any
    hparams: tuple[Hyperparams, Numbers]
    init: Callable[[], TrainState]
    step: Callable[..., tuple[TrainState, dict]]
    evaluate: Callable[..., dict]
    abstract_state: TrainState
    graph: Any
    """of the model as any one device can compute it"""
    kernels: str
    """a line on what computes attention and the SSD"""
    ladder: Ladder
    """chunk slots of a run that has just started"""


# fields of a batch for the devices
FED = ("input_ids", "segment_ids", "loss_mask", "route_ids", "byte_lengths")


def build(
    config: Config,
    *,
    devices: list | None = None,
    compiler_options: dict[str, Any] | None = None,
    change: Change | None = None,
) -> Program:
    """Everything of a run that does not depend on data; nothing is compiled yet.

    devices: those of a topology that is compiled for but not present (`tpu.plan`); default: all.
    change: puts functions of one's own in place of the run's.
    """
    mesh = make_mesh(config.mesh, devices)
    check(config, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    platform = mesh.devices.flat[0].platform
    compute = resolved(config.model.compute, platform)
    graph, params = abstract(replace(config.model, compute=compute))
    plain_graph, _ = abstract(replace(config.model, compute=without(compute)))
    packed_rows = rows_packed(config, shards)

    run = experiment(config, graph, packed_rows)
    run = change(run) if change else run
    seed_key = jax.random.key(config.seed)
    shapes = jax.eval_shape(run.init, seed_key)
    shardings = state_shardings(shapes, describe(nnx.merge(graph, params)), mesh)
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )
    hparams = run.numbers

    jit = partial(jax.jit, compiler_options=compiler_options)
    init = jit(run.init, out_shardings=shardings)
    step = jit(
        on_mesh(run.step, mesh),
        static_argnames=("capacities",),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    evaluate = jit(
        on_mesh(run.evaluate, mesh), static_argnames=("capacities",), out_shardings=replicated(mesh)
    )
    if devices is None:
        hparams = jax.device_put(hparams, replicated(mesh))
    ladder = Ladder.start(config.model, config.data.seq_len, packed_rows, config.train.accumulate)
    return Program(
        mesh, shardings, hparams, lambda: init(seed_key), step, evaluate, abstract_state,
        plain_graph, described(compute, platform), ladder,
    )  # fmt: skip


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError for a run that cannot be on this mesh, by itself or among several."""
    check_batch(config.data.batch_size, config.train.accumulate, mesh)
    check_vocabulary(config)


def check_vocabulary(config: Config) -> None:
    """Raise ConfigError if the model has fewer ids than the tokenizer of its text."""
    path, held = config.data.tokenizer, config.model.vocab_size
    if path and (needed := read_vocabulary(path).size) > held:
        raise ConfigError(f"model.vocab_size={held}: data.tokenizer={path!r} needs {needed}")


def experiment(config: Config, graph: Any, packed_rows: int) -> Experiment:
    """`train_step` and `eval_step` of a run, its settings bound."""

    def make_state(key: jax.Array) -> TrainState:
        init_key, noise_key = jax.random.split(key)
        params = init_params(config.model, init_key)
        return init_state(params, noise_key, config.model, config.optim)

    hold_from = config.controller.hold_from(config.train.steps)
    step = partial(
        train_step, hold_from=hold_from, graph=graph, model=config.model, optim=config.optim,
        num_steps=config.train.steps, accumulate=config.train.accumulate, packed_rows=packed_rows,
    )  # fmt: skip
    evaluate = partial(eval_step, graph=graph, packed_rows=packed_rows)
    return Experiment(make_state, step, evaluate, traced_numbers(config), graph)


def traced_numbers(config: Config) -> tuple[Hyperparams, Numbers]:
    """The numbers of a run that its program takes as inputs, so that others compile nothing."""
    return (
        Hyperparams(
            learning_rate=np.float32(config.optim.learning_rate),
            weight_decay=np.float32(config.optim.weight_decay),
            multiplier_S=np.asarray(config.optim.multipliers(config.model), np.float32),
            controller_gain=np.float32(config.controller.gain),
        ),
        config.model.numbers(),
    )


def untraced(config: Config) -> Config:
    """The configuration without what is traced: runs for which it is equal share one program.

    Traced are the numbers of `traced_numbers`, and the seed, through the key of the first state.
    Target ratios are not where the stride or the first bias of a router is made of them. The work
    directory, which no program knows, is left out too.
    """
    stages = [replace(s, chunking=s.chunking.without_numbers()) for s in config.model.stages[:-1]]
    zero = {"learning_rate": 1.0, "weight_decay": 0.0, "lr_multipliers": "none"}
    return replace(
        config,
        workdir="",
        seed=0,
        model=replace(config.model, stages=(*stages, config.model.stages[-1])),
        optim=replace(config.optim, **zero),
        controller=replace(config.controller, gain=0.0),
    )


def rows_packed(config: Config, shards: int) -> int:
    """Rows that share a row of slots, where the batch lies on `shards` devices."""
    return math.gcd(
        config.train.packed_rows, config.data.batch_size // config.train.accumulate // shards
    )


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """`function` traced where activations and kernels find the mesh, under its own name."""

    @wraps(function.func if isinstance(function, partial) else function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name])
        for name in FED
        if name in batch
    }


def put_whole_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch that every process has all rows of, as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(batch[name].shape, sharding, batch[name].__getitem__)
        for name in FED
        if name in batch
    }


def run_evaluation(
    program: Program,
    params: Any,
    corpus_part: Any,
    config: Config,
    capacities: tuple[int | None, ...],
    **limits: Any,
) -> Evaluation | None:
    """`run_batches` for a part of the corpus."""
    batches = eval_batches(corpus_part, config.data, route_groups=config.model.route_groups)
    names = config.model.route_names
    labels = without_folders(corpus_part.globs)
    return run_batches(
        program, params, batches, capacities, route_names=names,
        source_of=lambda document: labels[corpus_part.glob_of(document)], **limits,
    )  # fmt: skip


def run_batches(
    program: Program,
    params: Any,
    batches: Iterable[Batch],
    capacities: tuple[int | None, ...],
    **options: Any,
) -> Evaluation | None:
    """`evaluate` on the devices of a run; every process holds the whole batches."""

    def run_batch(batch, capacities):
        fed = put_whole_batch(batch, program.mesh)
        return program.evaluate(params, fed, capacities=capacities)

    return evaluate(batches, run_batch, capacities, **options)
