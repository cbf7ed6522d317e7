"""The compiled side of a run: what is jitted, with which shardings and which traced numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import jax
import numpy as np

from hnet.data import eval_batches
from hnet.loss import LossWeights
from hnet.model import abstract, init_params
from hnet.nn.kernels.table import described, resolved, without
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
class Program:
    """Jitted pure functions of a run and where their arguments live."""

    mesh: jax.sharding.Mesh
    shardings: Any
    hparams: tuple[Hyperparams, LossWeights]
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


FED = ("input_ids", "segment_ids", "loss_mask", "route_ids")  # fields of a batch for the devices


def build(
    config: Config,
    *,
    devices: list | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Program:
    """Everything of a run that does not depend on data; nothing is compiled yet.

    devices: those of a topology that is compiled for but not present (`tpu.plan`); default: all.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.data.batch_size, config.train.accumulate, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    platform = mesh.devices.flat[0].platform
    compute = replace(resolved(config.model.compute, platform), batch_shards=shards)
    graph, _ = abstract(replace(config.model, compute=compute))
    plain_graph, _ = abstract(replace(config.model, compute=without(compute)))
    packed_rows = rows_packed(config, shards)

    def make_state(key):
        init_key, noise_key = jax.random.split(key)
        params = init_params(config.model, init_key)
        return init_state(params, noise_key, config.model, config.optim)

    seed_key = jax.random.key(config.seed)
    shapes = jax.eval_shape(make_state, seed_key)
    shardings = state_shardings(shapes, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )
    stages = config.model.stages
    hparams = (
        Hyperparams(
            learning_rate=np.float32(config.optim.learning_rate),
            weight_decay=np.float32(config.optim.weight_decay),
            multiplier_S=np.asarray(config.optim.multipliers(config.model), np.float32),
        ),
        LossWeights(
            target_ratio_SR=np.asarray(config.model.target_ratios(), np.float32),
            aux_weight_S=np.asarray([s.chunking.aux_loss_weight for s in stages[:-1]], np.float32),
        ),
    )

    jit = partial(jax.jit, compiler_options=compiler_options)
    init = jit(make_state, out_shardings=shardings)
    step = jit(
        partial(
            _on_mesh(train_step, mesh), graph=graph, model=config.model, optim=config.optim,
            controller=config.controller, num_steps=config.train.steps,
            accumulate=config.train.accumulate, packed_rows=packed_rows,
        ),
        static_argnames=("capacities",),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )  # fmt: skip
    eval_fn = jit(
        partial(_on_mesh(eval_step, mesh), graph=graph, packed_rows=packed_rows),
        static_argnames=("capacities",),
        out_shardings=replicated(mesh),
    )
    if devices is None:
        hparams = jax.device_put(hparams, replicated(mesh))
    ladder = Ladder.start(config.model, config.data.seq_len, packed_rows)
    return Program(
        mesh, shardings, hparams, lambda: init(seed_key), step, eval_fn, abstract_state,
        plain_graph, described(compute, platform), ladder,
    )  # fmt: skip


def rows_packed(config: Config, shards: int) -> int:
    """Rows that share a row of slots, where the batch lies on `shards` devices."""
    return math.gcd(
        config.train.packed_rows, config.data.batch_size // config.train.accumulate // shards
    )


def _on_mesh(step: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """`step` traced where activations and kernels find the mesh."""

    @wraps(step)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args, **kwargs)

    return traced


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name])
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
    """`evaluate` on the devices of a run; every process holds the whole batches."""
    sharding = batch_sharding(program.mesh)

    def run_batch(batch, capacities):
        fed = {
            name: jax.make_array_from_callback(batch[name].shape, sharding, batch[name].__getitem__)
            for name in FED
            if name in batch
        }
        return program.evaluate(params, fed, capacities=capacities)

    batches = eval_batches(corpus_part, config.data, route_groups=config.model.route_groups)
    names = config.model.route_names
    return evaluate(batches, run_batch, capacities, route_names=names, **limits)
