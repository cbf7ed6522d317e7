"""The compiled side of a run: what is jitted, with which shardings and which traced numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from hnet.data import eval_batches
from hnet.loss import LossWeights
from hnet.model import abstract, init_params
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


def build(config: Config) -> Program:
    """Everything of a run that does not depend on data; nothing is compiled yet."""
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.train.accumulate, mesh)
    graph, abstract_params = abstract(config.model)
    make_state = partial(init_state, config=config.optim)
    shapes = jax.eval_shape(make_state, abstract_params)
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
            target_ratio_S=np.asarray([s.chunking.target_ratio for s in stages[:-1]], np.float32),
            ratio_weight_S=np.full(len(stages) - 1, config.optim.ratio_loss_weight, np.float32),
        ),
    )

    def init():
        def create(key):
            return make_state(init_params(config.model, key))

        return jax.jit(create, out_shardings=shardings)(jax.random.key(config.seed))

    step = jax.jit(
        partial(
            train_step, graph=graph, optim=config.optim, num_steps=config.train.steps,
            accumulate=config.train.accumulate,
        ),
        static_argnames=("capacities",),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )  # fmt: skip
    eval_fn = jax.jit(
        partial(eval_step, graph=graph),
        static_argnames=("capacities",),
        out_shardings=replicated(mesh),
    )
    hparams = jax.device_put(hparams, replicated(mesh))
    return Program(mesh, shardings, hparams, init, step, eval_fn, abstract_state, graph)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays."""
    sharding = batch_sharding(mesh)
    fed = {k: batch[k] for k in ("input_ids", "segment_ids", "loss_mask")}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in fed.items()}


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
            k: jax.make_array_from_callback(batch[k].shape, sharding, batch[k].__getitem__)
            for k in ("input_ids", "segment_ids", "loss_mask")
        }
        return program.evaluate(params, fed, capacities=capacities)

    return evaluate(eval_batches(corpus_part, config.data), run_batch, capacities, **limits)
