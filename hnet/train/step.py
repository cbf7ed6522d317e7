"""The training step and the evaluation step: pure functions of arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hnet.loss import LossWeights, next_byte_nll, total_loss
from hnet.train.optim import Hyperparams, OptimConfig, apply_update, optimizer, schedule

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything an update changes; arrays only."""

    step: jax.Array
    """updates done, int32"""
    params: Any
    opt_state: optax.OptState
    skipped: jax.Array
    """updates in a row that were left out because loss or gradient was not finite, int32"""


def init_state(params: Any, config: OptimConfig) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer(config).init(params), zero)


def train_step(
    state: TrainState,
    batch: Batch,
    hparams: tuple[Hyperparams, LossWeights],
    *,
    graph: nnx.GraphDef,
    optim: OptimConfig,
    num_steps: int,
    capacities: tuple[int | None, ...],
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update from one batch of rows.

    A non-finite loss or gradient leaves parameters and optimizer as they were and is counted.
    With `accumulate` > 1 the batch is cut into that many micro-batches, whose gradients and
    metrics are averaged; rate losses then see the rates of a micro-batch.
    """
    update_numbers, loss_weights = hparams

    def loss_fn(params, micro_batch):
        model = nnx.merge(graph, params)
        logits_BLV, routes = model(
            micro_batch["input_ids"], micro_batch["segment_ids"], capacities=capacities
        )
        with jax.named_scope("loss"):
            return total_loss(logits_BLV, routes, micro_batch, loss_weights)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = grad_fn(state.params, batch)
    else:
        grads, metrics = _accumulated(grad_fn, state.params, batch, accumulate)

    with jax.named_scope("optimizer"):
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(grad_norm)
        direction, opt_state = optimizer(optim).update(grads, state.opt_state)
        factor = schedule(optim, state.step, num_steps)
        params = apply_update(state.params, direction, update_numbers, factor)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = jnp.where(finite, 0, state.skipped + 1)
        params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
    metrics |= {
        "grad_norm": grad_norm,
        "learning_rate": update_numbers.learning_rate * factor,
        "skipped_in_a_row": skipped,
    }
    return TrainState(state.step + 1, params, opt_state, skipped), metrics


def _accumulated(grad_fn, params, batch: Batch, count: int):
    """Mean gradient and metrics over `count` interleaved micro-batches (sums stay sums).

    Micro-batch i takes rows i, i + count, ...: on a batch-sharded mesh each device cuts its own
    rows and nothing moves.
    """

    def cut(rows):
        return rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)

    def one(total, micro_batch):
        (_, metrics), grads = grad_fn(params, micro_batch)
        return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(one, zeros, jax.tree.map(cut, dict(batch)))
    return jax.tree.map(lambda g: g / count, grads), {
        name: _combine(name, values) for name, values in metrics.items()
    }


def _combine(name: str, values: jax.Array) -> jax.Array:
    if name in ("nats", "bytes") or name.endswith(("prob_hist", "/chunks")):
        return jnp.sum(values, axis=0)
    return jnp.max(values) if name.endswith("max_chunks") else jnp.mean(values)


def eval_step(
    params: Any, batch: Batch, *, graph: nnx.GraphDef, capacities: tuple[int | None, ...]
) -> Metrics:
    """Nats of each byte and what each stage did (S of them cut); nothing is learned."""
    logits_BLV, routes = nnx.merge(graph, params)(
        batch["input_ids"], batch["segment_ids"], capacities=capacities
    )
    wanted_S = [jnp.sum(r.num_boundaries_B, dtype=jnp.float32) for r in routes]
    kept_S = [jnp.sum(r.boundary_mask_BL, dtype=jnp.float32) for r in routes]
    return {
        "nll_BL": next_byte_nll(logits_BLV, batch["input_ids"]),
        "positions": jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32),
        "num_chunks_S": wanted_S,
        "overflow_S": [wanted - kept for wanted, kept in zip(wanted_S, kept_S)],
        "max_chunks_S": [jnp.max(r.num_boundaries_B) for r in routes],
    }
