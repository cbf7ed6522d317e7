"""The training step and the evaluation step: pure functions of arrays."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.rate_control import hold_rates, logits_without_offset
from hnet.chunking.rates import RateCounts, counts_by_stage
from hnet.chunking.routes import keep_absent
from hnet.config import HNetConfig
from hnet.data import batch_hash
from hnet.loss import (
    Totals,
    add_sums,
    batch_metrics,
    init_loss_states,
    next_byte_nll,
    next_loss_states,
    total_loss,
    totals_of,
)
from hnet.model import HNetLM
from hnet.nn.parameters import describe, trained, with_frozen
from hnet.stage import Numbers
from hnet.train.config import OptimConfig
from hnet.train.groups import group_sums
from hnet.train.norms import first_non_finite, found_if, norms
from hnet.train.optim import (
    Hyperparams,
    apply_update,
    average,
    direction,
    optimizer,
    schedule,
    targets_at,
)
from hnet.train.spikes import no_spikes, watch

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All arrays that an update changes."""

    step: jax.Array
    """number of updates done, int32"""
    params: Any
    opt_state: optax.OptState
    key: jax.Array
    """random key for the noise of relaxed predictors; each step folds in its number"""
    skipped: jax.Array
    """number of updates in a row skipped because loss or gradient was not finite, int32"""
    loss_states: tuple = ()
    """states that the losses of each stage carry between updates"""
    ema: Any = ()
    """moving average of the parameters; () without `optim.ema_decay`"""
    spikes: Any = ()
    """`hnet.train.spikes.Spikes`; () without `train.spike_deviations`"""


def init_state(
    params: Any,
    key: jax.Array,
    model: HNetConfig,
    optim: OptimConfig,
    infos: Any,
    *,
    has_spike_rule: bool = False,
) -> TrainState:
    """State before the first update. infos: metadata of the parameters; frozen ones have no
    optimizer state."""
    zero = jnp.zeros((), jnp.int32)
    states = init_loss_states(model)
    opt_state = optimizer(optim, infos).init(trained(infos, params))
    ema = jax.tree.map(jnp.copy, params) if optim.ema_decay else ()
    spikes = no_spikes() if has_spike_rule else ()
    return TrainState(zero, params, opt_state, key, zero, states, ema, spikes)


def with_params(state: TrainState, params: Any) -> TrainState:
    """The first state with these parameters."""
    ema = jax.tree.map(jnp.copy, params) if state.ema else state.ema
    return state._replace(params=params, ema=ema)


def train_step(
    state: TrainState,
    batch: Batch,
    hparams: tuple[Hyperparams, Numbers],
    *,
    graph: nnx.GraphDef,
    model: HNetConfig,
    optim: OptimConfig,
    capacities: tuple[int | None, ...],
    rows_sharing_slots: int = 1,
    accumulate: int = 1,
    targets_move: bool = False,
    log_norms: bool = False,
    spike_window: int = 0,
    num_sources: int = 0,
) -> tuple[TrainState, Metrics]:
    """One update from one batch of rows. The controller acts from `Hyperparams.hold_from` on.

    Frozen parameters (`ParameterInfo.frozen`) get no gradient and keep their bits.
    If loss or gradient is not finite, parameters, optimizer and loss states stay unchanged and the
    skip is counted; `first_non_finite` in the metrics is then an index in `norms.watched`. A state
    with `spikes` skips spikes too (`hnet.train.spikes`), which are counted there. With
    `accumulate` > 1 the batch is divided into that many micro-batches. Update and metrics are the
    same, except for `max_slots`, the noise of relaxed predictors, and which rows share slots.
    """
    update_numbers, numbers = hparams
    if targets_move:
        numbers = targets_at(update_numbers, numbers, state.step)
    key = jax.random.fold_in(state.key, state.step)
    infos = describe(nnx.merge(graph, state.params))
    own = trained(infos, state.params)

    def forward(own, rows, key):
        return nnx.merge(graph, with_frozen(own, state.params))(
            rows["input_ids"], rows["segment_ids"], capacities=capacities,
            rows_sharing_slots=rows_sharing_slots, route_ids_BL=rows.get("route_ids"),
            boundaries_BL=rows.get("boundaries"), key=key, numbers=numbers,
        )  # fmt: skip

    def totals(own, rows, key):
        return totals_of(model, forward(own, rows, key)[1], rows)

    def loss_fn(own, rows, key, whole=None):
        logits_BLV, records = forward(own, rows, key)
        with jax.named_scope("loss"):
            loss, sums = total_loss(
                model, logits_BLV, records, rows, numbers, whole, state.loss_states
            )
            return loss, sums | {"groups": group_sums(logits_BLV, rows, num_sources)}

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, sums), grads = grad_fn(own, batch, key)
    else:
        grads, sums = _accumulated(totals, grad_fn, own, batch, key, accumulate)

    metrics = batch_metrics(model, sums, numbers) | sums["groups"]
    counts = sums.get("chunks_SR"), sums.get("positions_SR")
    new_state, found = _updated(
        state, grads, metrics, counts, (update_numbers, numbers), infos, model=model,
        optim=optim, log_norms=log_norms, spike_window=spike_window,
    )  # fmt: skip
    return new_state, metrics | found | {"batch_hash": jnp.stack(batch_hash(batch))}


def _updated(
    state: TrainState,
    grads: Any,
    metrics: Metrics,
    counts: tuple[jax.Array | None, jax.Array | None],
    hparams: tuple[Hyperparams, Numbers],
    infos: Any,
    *,
    model: HNetConfig,
    optim: OptimConfig,
    log_norms: bool,
    spike_window: int,
) -> tuple[TrainState, Metrics]:
    """The state after the update by these gradients, and what it adds to the metrics.

    counts: chunks and positions (S, R) of the batch; None without stages that chunk.
    """
    update_numbers, numbers = hparams
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(grad_norm)
        keeps, spikes, found = finite, state.spikes, {}
        if spikes:
            both_K = jnp.stack([metrics["loss/total"], grad_norm])
            is_spike, spikes = watch(spikes, both_K, update_numbers.spike_deviations, spike_window)
            keeps = finite & ~is_spike
            found |= {"spike": is_spike.astype(jnp.int32), "spikes": spikes.skipped}
        directions, opt_state = direction(optim, infos, grads, state.opt_state)
        factor = schedule(optim, state.step, update_numbers.length)
        params = apply_update(state.params, directions, infos, update_numbers, factor)
        if any(stage.chunking.hold_rate for stage in model.stages[:-1]):
            gain = update_numbers.rate_control_gain * jnp.sqrt(factor)
            gain = jnp.where(state.step < update_numbers.hold_from, 0.0, gain)
            params = hold_rates(params, *counts, [n["target_ratio_R"] for n in numbers], gain)
            params = with_frozen(trained(infos, params), state.params)
        new, old = (params, opt_state), (state.params, state.opt_state)
        if model.num_routes > 1:
            new = keep_absent(new, old, infos, counts[1])
        rates = None if counts[0] is None else RateCounts(*counts, jnp.zeros_like(counts[0]))
        ema = state.ema
        if optim.ema_decay:
            ema = average(ema, new[0], update_numbers.ema_decay, state.step)
        new += (next_loss_states(model, state.loss_states, rates, numbers), ema)
        old += (state.loss_states, state.ema)
        kept = jax.tree.map(lambda n, o: jnp.where(keeps, n, o), new, old)
        params, opt_state, loss_states, ema = kept
        skipped = jnp.where(finite, 0, state.skipped + 1)
        if log_norms:
            moved = jax.tree.map(jnp.subtract, params, state.params)
            found["update_norm"] = optax.tree.norm(moved)
            for name, tree in (("grad_norm", grads), ("update_norm", trained(infos, moved))):
                found |= norms(name, tree, model.num_chunked)
        find = partial(first_non_finite, state.params, metrics, grads, model.num_chunked)
        found["first_non_finite"] = found_if(~finite, find)
    found |= {
        "grad_norm": grad_norm,
        "learning_rate": update_numbers.learning_rate * factor,
        "skipped_in_a_row": skipped,
    }
    done = state.step + 1
    new_state = TrainState(done, params, opt_state, state.key, skipped, loss_states, ema, spikes)
    return new_state, found


def _accumulated(totals: Callable, grad_fn: Callable, params: Any, batch: Batch, key, count: int):
    """Gradient and sums of a batch, computed in `count` interleaved micro-batches.

    Micro-batch i takes rows i, i + count, ...: on a batch-sharded mesh each device divides its own
    rows and no data moves. The loss divides by totals of the whole batch. A first pass computes
    them; it runs only the encoders and predictors, up to the last predictor.
    """

    def divided(rows):
        return rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(divided, dict(batch)), jax.random.split(key, count)

    def add_totals(total, part):
        return jax.tree.map(jnp.add, total, totals(params, *part)), None

    def add_gradient(total, part):
        (_, sums), grads = grad_fn(params, *part, whole)
        return jax.tree.map(jnp.add, total, grads), sums

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(totals, params, *first))
    whole: Totals = jax.lax.scan(add_totals, zeros, parts)[0]
    grads, sums = jax.lax.scan(add_gradient, jax.tree.map(jnp.zeros_like, params), parts)
    groups = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums.pop("groups"))
    return grads, add_sums(sums) | {"groups": groups}


def eval_step(
    params: Any,
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    capacities: tuple[int | None, ...],
    rows_sharing_slots: int = 1,
    numbers: Numbers | None = None,
) -> Metrics:
    """Nats of each byte and chunk statistics of each of the S chunking stages; no update.

    numbers: traced numbers of the parts; None: those of the configuration of `graph`.
    """
    model = nnx.merge(graph, params)
    logits_BLV, records = model(
        batch["input_ids"], batch["segment_ids"], capacities=capacities,
        rows_sharing_slots=rows_sharing_slots, route_ids_BL=batch.get("route_ids"),
        boundaries_BL=batch.get("boundaries"), numbers=numbers,
    )  # fmt: skip
    return eval_metrics(model, params, logits_BLV, records, batch)


def eval_metrics(
    model: HNetLM, params: Any, logits_BLV: jax.Array, records: list[Boundaries], batch: Batch
) -> Metrics:
    """The results of `eval_step`, from the outputs of the model."""
    wanted_S = [jnp.sum(r.num_boundaries_B, dtype=jnp.float32) for r in records]
    kept_S = [jnp.sum(r.boundary_mask_BL, dtype=jnp.float32) for r in records]
    by_route = {}
    if model.config.num_routes > 1:
        routes = tuple(stage.chunking.routes for stage in model.config.stages[:-1])
        counts = counts_by_stage(records, routes)
        by_route = {"chunks_SR": counts.chunks_R, "positions_SR": counts.positions_R}
    return by_route | {
        "logits_without_offset": logits_without_offset(params, records),
        "nll_BL": next_byte_nll(logits_BLV, batch["input_ids"]),
        "positions": jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32),
        "num_chunks_S": wanted_S,
        "overflow_S": [wanted - kept for wanted, kept in zip(wanted_S, kept_S)],
        "max_slots_S": [jnp.max(r.num_slots_G) for r in records],
    }
