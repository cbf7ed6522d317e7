"""The compiled functions of a run, their shardings and their traced numbers."""

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
from hnet.train.capacity import CapacitySchedule
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation, evaluate
from hnet.train.initial import frozen_graph
from hnet.train.memory import check_memory
from hnet.train.norms import watched
from hnet.train.optim import Hyperparams, Length
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
    """A run as pure functions of pytrees, before jit, sharding and donation.

    `build` jits it for a mesh, `parallel_program.build` jits several runs as one program. For
    another step, loss or state, replace its functions (`Change`). State and batch may have any
    content, as long as the state is a `TrainState` with its first five fields.
    """

    init: Callable[[jax.Array], TrainState]
    """key -> state"""
    step: Callable[..., tuple[TrainState, dict]]
    """(state, batch, numbers, capacities=...) -> (state, metrics)"""
    evaluate: Callable[..., dict]
    """(parameters, batch, capacities=...) -> metrics; of several runs in one program also
    numbers=..., the second of its traced `numbers`"""
    numbers: Any
    """traced numbers, which a sweep can vary without recompiling"""
    graph: Any
    """structure of the model: ``nnx.merge(graph, state.params)``"""


Change = Callable[[Experiment], Experiment]
"""Function that replaces some functions of a run by your own."""


@dataclass(frozen=True)
class CompiledRun:
    """Jitted pure functions of a run and the shardings of their arguments."""

    mesh: jax.sharding.Mesh
    shardings: Any
    hparams: tuple[Hyperparams, Numbers]
    init: Callable[[], TrainState]
    step: Callable[..., tuple[TrainState, dict]]
    evaluate: Callable[..., dict]
    abstract_state: TrainState
    graph: Any
    """structure of the model with the array-code backends, which run on any device"""
    kernels: str
    """line that names the backends of attention and the SSD"""
    ladder: CapacitySchedule
    """capacity schedule of a run that starts at step 0"""

    @property
    def watched(self) -> list[str]:
        """Names of the tensors that `first_non_finite` of a step's metrics counts."""
        num_chunked = nnx.merge(self.graph, self.abstract_state.params).config.num_chunked
        return watched(self.abstract_state.params, num_chunked)


# fields of a batch that are sent to the devices
DEVICE_FIELDS = (
    "input_ids", "segment_ids", "loss_mask", "route_ids", "byte_lengths", "labels", "source_ids",
    "script_ids",
)  # fmt: skip


def graphs(config: Config, device: jax.Device) -> tuple[nnx.GraphDef, nnx.GraphDef, dict, str]:
    """(structure of the model on this device, the same with array code only, shapes of its
    parameters, description of its kernels)."""
    compute = resolved(config.model.compute, device.platform, device.device_kind)
    graph, params = abstract(replace(config.model, compute=compute))
    plain_graph, _ = abstract(replace(config.model, compute=without(compute)))
    graph = frozen_graph(config.init, graph, params)
    plain_graph = frozen_graph(config.init, plain_graph, params)
    return graph, plain_graph, params, described(compute, device.platform)


def build(
    config: Config,
    *,
    devices: list | None = None,
    compiler_options: dict[str, Any] | None = None,
    change: Change | None = None,
) -> CompiledRun:
    """Everything of a run that does not depend on data; nothing is compiled yet.

    devices: devices to compile for, possibly of an absent topology (`tpu.plan`); default: all.
    change: replaces functions of the run by your own.
    """
    mesh = make_mesh(config.mesh, devices)
    check(config, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    graph, plain_graph, params, kernels = graphs(config, mesh.devices.flat[0])
    rows_sharing_slots = rows_that_share(config, shards)

    run = experiment(config, graph, rows_sharing_slots)
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

    def init_once():
        config.model.read_files()
        return init(seed_key)

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
    ladder = CapacitySchedule.start(
        config.model, config.data.seq_len, rows_sharing_slots, config.train.accumulate
    )
    return CompiledRun(
        mesh, shardings, hparams, init_once, step, evaluate, abstract_state,
        plain_graph, kernels, ladder,
    )  # fmt: skip


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError if a run, single or one of several, does not fit this mesh."""
    check_batch(config.data.batch_size, config.train.accumulate, mesh)
    check_vocabulary(config)
    check_memory(config, mesh)


def check_vocabulary(config: Config) -> None:
    """Raise ConfigError if the model's vocabulary is smaller than the tokenizer's."""
    path, held = config.data.tokenizer, config.model.vocab_size
    if path and (needed := read_vocabulary(path).size) > held:
        raise ConfigError(f"model.vocab_size={held}: data.tokenizer={path!r} needs {needed}")


def experiment(config: Config, graph: Any, rows_sharing_slots: int) -> Experiment:
    """Initialisation, `train_step` and `eval_step` with the settings of a run bound."""

    def make_state(key: jax.Array) -> TrainState:
        init_key, noise_key = jax.random.split(key)
        params = init_params(config.model, init_key)
        infos = describe(nnx.merge(graph, params))
        return init_state(
            params, noise_key, config.model, config.optim, infos,
            has_spike_rule=config.train.spike_deviations > 0,
        )  # fmt: skip

    step = partial(
        train_step, graph=graph, model=config.model, optim=config.optim,
        accumulate=config.train.accumulate, rows_sharing_slots=rows_sharing_slots,
        targets_move=bool(config.rate_control.start_ratios), log_norms=config.train.log_norms,
        spike_window=config.train.spike_window, num_sources=max(1, len(config.data.files)),
    )  # fmt: skip
    evaluate = partial(eval_step, graph=graph, rows_sharing_slots=rows_sharing_slots)
    return Experiment(make_state, step, evaluate, traced_numbers(config), graph)


def traced_numbers(config: Config) -> tuple[Hyperparams, Numbers]:
    """Numbers of a run that are inputs of its program: other values do not recompile it."""
    return (
        Hyperparams(
            learning_rate=np.float32(config.optim.learning_rate),
            weight_decay=np.float32(config.optim.weight_decay),
            multiplier_S=np.asarray(config.optim.multipliers(config.model), np.float32),
            rate_control_gain=np.float32(config.rate_control.gain),
            ema_decay=np.float32(config.optim.ema_decay),
            start_ratio_S=np.asarray(config.rate_control.start_ratios, np.float32),
            ramp_frac=np.float32(config.rate_control.ramp_frac),
            spike_deviations=np.float32(config.train.spike_deviations),
            length=Length.of(config.optim, config.train.steps),
            hold_from=np.int32(config.rate_control.hold_from(config.train.steps)),
        ),
        config.model.numbers(),
    )


def untraced(config: Config) -> Config:
    """The configuration with traced values blanked. Runs in which it is equal share one program.

    Traced are the numbers of `traced_numbers`, and the seed, through the key of the first state.
    Target ratios are not traced if a predictor's stride or initial bias is computed from them. The
    work directory, which no program depends on, is blanked too.
    """
    stages = [replace(s, chunking=s.chunking.without_numbers()) for s in config.model.stages[:-1]]
    zero = {"learning_rate": 1.0, "weight_decay": 0.0, "lr_multipliers": "none"}
    zero["ema_decay"] = 0.5 if config.optim.ema_decay else 0.0
    ratios = (1.0,) * len(config.rate_control.start_ratios)
    deviations = 2.0 if config.train.spike_deviations else 0.0
    return replace(
        config,
        workdir=".",
        seed=0,
        model=replace(config.model, stages=(*stages, config.model.stages[-1])),
        optim=replace(config.optim, **zero),
        rate_control=replace(config.rate_control, gain=0.0, start_ratios=ratios, ramp_frac=1.0),
        train=replace(config.train, spike_deviations=deviations),
    )


def rows_that_share(config: Config, shards: int) -> int:
    """Number of rows that share a row of slots if the batch is sharded over `shards` devices."""
    return math.gcd(
        config.train.rows_sharing_slots, config.data.batch_size // config.train.accumulate // shards
    )


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """`function` traced with `mesh` as the abstract mesh, under its own name."""

    @wraps(function.func if isinstance(function, partial) else function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of a batch."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name])
        for name in DEVICE_FIELDS
        if name in batch
    }


def put_whole_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Global arrays from a batch of which every process has all rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(batch[name].shape, sharding, batch[name].__getitem__)
        for name in DEVICE_FIELDS
        if name in batch
    }


def run_evaluation(
    program: CompiledRun,
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
    program: CompiledRun,
    params: Any,
    batches: Iterable[Batch],
    capacities: tuple[int | None, ...],
    **options: Any,
) -> Evaluation | None:
    """`evaluate` on the devices of a run; every process has all rows of each batch."""

    def run_batch(batch, capacities):
        fed = put_whole_batch(batch, program.mesh)
        return program.evaluate(params, fed, capacities=capacities)

    return evaluate(batches, run_batch, capacities, **options)
