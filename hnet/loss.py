"""Training loss and metrics: next-byte cross-entropy, losses of the stages, batch metrics."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.part import LossInputs
from hnet.chunking.rates import RateCounts, counts_by_stage, target_rate
from hnet.config import EOS_ID, HNetConfig
from hnet.stage import Numbers

PROB_BINS = 20  # bins in the histogram of boundary probabilities


def next_byte_nll(logits_BLV: jax.Array, input_ids_BL: jax.Array) -> jax.Array:
    """-ln p(byte t | bytes < t) at [:, t] in nats, float32; 0 at t = 0, which is not predicted."""
    logits = logits_BLV[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, input_ids_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(jax.nn.logsumexp(logits, axis=-1) - picked, ((0, 0), (1, 0)))


def trained_targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Positions whose byte is a target: source bytes (the loss mask) and each document's EOS."""
    seen_BL = batch["segment_ids"] != 0
    same_BL = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    predicted_BL = seen_BL & jnp.pad(same_BL, ((0, 0), (1, 0)))
    return batch["loss_mask"] | (predicted_BL & (batch["input_ids"] == EOS_ID))


def targets_kept(
    config: HNetConfig, records: list[Boundaries], batch: Mapping[str, jax.Array]
) -> jax.Array:
    """`trained_targets`; with overflow="ignore" without those after a clipped boundary.

    A clipped boundary at t is the first that a row lacks when it predicts the byte at t + 1.
    """
    targets_BL = trained_targets(batch)
    if not records or config.stages[0].chunking.overflow == "train":
        return targets_BL
    clipped_BL = (records[0].boundary_ste_BL > 0.5) & ~records[0].boundary_mask_BL
    before_BL = jnp.pad(clipped_BL[:, :-1], ((0, 0), (1, 0)))
    return targets_BL & ~jax.lax.cummax(before_BL.astype(jnp.int8), axis=1).astype(bool)


def scored_bytes(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Number of source bytes under the loss mask: one per position, or those of its token."""
    bytes_BL = batch.get("byte_lengths", 1)
    return jnp.sum(jnp.where(batch["loss_mask"], bytes_BL, 0), dtype=jnp.int32)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Bits per byte from nats summed over `num_bytes` source bytes; NaN if there are none."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan


class Totals(NamedTuple):
    """Denominators of the loss of a batch; the totals of its parts add up."""

    targets: jax.Array
    """number of positions whose byte is a target"""
    rates: RateCounts | None
    """counts (S, R) of the stages that chunk; None if none does"""


def totals_of(
    config: HNetConfig, records: list[Boundaries], batch: Mapping[str, jax.Array]
) -> Totals:
    targets = jnp.sum(targets_kept(config, records, batch), dtype=jnp.float32)
    routes = tuple(stage.chunking.routes for stage in config.stages[:-1])
    return Totals(targets, counts_by_stage(records, routes) if records else None)


def init_loss_states(config: HNetConfig) -> tuple[tuple, ...]:
    """States of the losses of each stage that chunks, before the first update."""
    return tuple(
        tuple(loss.part().init() for loss in stage.chunking.losses) for stage in config.stages[:-1]
    )


def next_loss_states(
    config: HNetConfig, states: tuple[tuple, ...], counts: RateCounts | None, numbers: Numbers
) -> tuple[tuple, ...]:
    """States of the losses after an update. counts: counts of the whole batch, (S, R)."""
    return tuple(
        tuple(
            loss.part().next_state(
                state, _of_stage(counts, s, stage.chunking.routes), own["target_ratio_R"],
                loss.with_numbers(traced),
            )
            for loss, state, traced in zip(stage.chunking.losses, states[s], own["losses"])
        )
        for s, (stage, own) in enumerate(zip(config.stages[:-1], numbers))
    )  # fmt: skip


def total_loss(
    config: HNetConfig,
    logits_BLV: jax.Array,
    records: list[Boundaries],
    batch: Mapping[str, jax.Array],
    numbers: Numbers,
    whole: Totals | None = None,
    states: tuple[tuple, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, sums): mean cross-entropy in nats plus the weighted losses of all stages, and the sums
    from which `batch_metrics` computes the metrics.

    records: boundaries of each stage that chunks. numbers: traced numbers (`config.numbers()`).
    All means are over the global batch. whole: totals of the batch that these rows are part of;
    default: these rows are the whole batch. Losses, gradients and sums of the parts of a batch add
    up to those of the batch (`add_sums`). states: states of the losses; None: those before the
    first update. `batch["labels"]` (B, L): bool, boundary labels for a loss with labels="given".
    """
    own = totals_of(config, records, batch)
    whole = own if whole is None else whole
    states = init_loss_states(config) if states is None else states
    nll_BL = next_byte_nll(logits_BLV, batch["input_ids"])
    nats = jnp.sum(jnp.where(targets_kept(config, records, batch), nll_BL, 0.0))
    loss = ce = nats / jnp.maximum(whole.targets, 1.0)
    sums = {
        "loss/ce": ce,
        "nats": jnp.sum(jnp.where(batch["loss_mask"], nll_BL, 0.0)),
        "bytes": scored_bytes(batch),
        "positions": jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32),
    }
    if records:
        sums["chunks_SR"], sums["positions_SR"] = own.rates.chunks_R, own.rates.positions_R
    for s, (stage, boundaries) in enumerate(zip(config.stages, records)):
        R, chunking = stage.chunking.routes, stage.chunking
        found = stage_sums(boundaries) | {"aux_loss": jnp.zeros(())}
        for settings, traced, state in zip(chunking.losses, numbers[s]["losses"], states[s]):
            x = LossInputs(
                boundaries, settings.with_numbers(traced), numbers[s]["target_ratio_R"],
                chunking.has_null_chunk, _of_stage(own.rates, s, R), _of_stage(whole.rates, s, R),
                nll_BL, logits_BLV, batch.get("labels"), state,
            )  # fmt: skip
            value = settings.part()(x)
            loss += x.config.weight * value
            found["aux_loss"] += value
        sums |= {f"stage{s}/{name}": value for name, value in found.items()}
    return loss, sums | {"loss/total": loss}


def _of_stage(counts: RateCounts, s: int, routes: int) -> RateCounts:
    return jax.tree.map(lambda n_SR: n_SR[s, :routes], counts)


def stage_sums(boundaries: Boundaries) -> dict[str, jax.Array]:
    """Statistics of a stage for `batch_metrics`: sums, except max_slots, which is a maximum."""
    p_BL, valid_BL = boundaries.boundary_prob_BL, boundaries.segment_ids_BL != 0
    undecided_BL = valid_BL & (p_BL >= 0.4) & (p_BL <= 0.6)
    bin_BL = jnp.where(valid_BL, jnp.minimum(p_BL * PROB_BINS, PROB_BINS - 1), -1)
    bins = jnp.arange(PROB_BINS, dtype=jnp.int32)
    in_bin = bin_BL.astype(jnp.int32)[..., None] == bins[None, None, :]
    return {
        "positions": jnp.sum(valid_BL, dtype=jnp.float32),
        "prob": jnp.sum(jnp.where(valid_BL, p_BL, 0.0)),
        "undecided": jnp.sum(undecided_BL, dtype=jnp.float32),
        "chunks": jnp.sum(boundaries.num_boundaries_B, dtype=jnp.float32),
        "kept": jnp.sum(boundaries.boundary_mask_BL, dtype=jnp.float32),
        "max_slots": jnp.max(boundaries.num_slots_G),
        "prob_hist": jnp.sum(in_bin, axis=(0, 1), dtype=jnp.int32),
    }


def add_sums(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums of a batch from the sums of its parts, stacked on a leading axis."""
    return {
        name: jnp.max(values) if name.endswith("max_slots") else jnp.sum(values, axis=0)
        for name, values in sums.items()
    }


def batch_metrics(
    config: HNetConfig, sums: dict[str, jax.Array], numbers: Numbers
) -> dict[str, jax.Array]:
    """Logged metrics of a batch, a flat dict, from the sums of `total_loss`.

    `loss/ce`: mean over all targets. `nats`, `bytes`: sums over source bytes (`batch["loss_mask"]`:
    no BOS, EOS, padding); bpb = nats / bytes / ln 2.
    """
    metrics = {name: sums[name] for name in ("loss/ce", "loss/total", "nats", "bytes")}
    for s, stage in enumerate(config.stages[:-1]):
        R, prefix = stage.chunking.routes, f"stage{s}/"
        own = {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}
        found = stage_metrics(own, sums["positions"])
        positions_R = sums["positions_SR"][s, :R]
        found["target_rate"] = target_rate(positions_R, numbers[s]["target_ratio_R"])
        if R > 1:
            found |= route_metrics(sums["chunks_SR"][s], positions_R, config.route_names)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    return metrics


def route_metrics(
    chunks_R: jax.Array, positions_R: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Boundary rate and positions per chunk of each route; 0 for a route without positions."""
    found = {}
    for r, name in enumerate(names):
        found[f"route_{name}/boundary_rate"] = chunks_R[r] / jnp.maximum(positions_R[r], 1.0)
        found[f"route_{name}/positions_per_chunk"] = positions_R[r] / jnp.maximum(chunks_R[r], 1.0)
    return found


def stage_metrics(sums: dict[str, jax.Array], num_bytes: jax.Array) -> dict[str, jax.Array]:
    """Metrics of one stage for a batch, from its sums.

    boundary_rate: chunks per position of this stage (F). boundary_prob: mean p (G).
    bytes_per_chunk: source and separator bytes per chunk (micro-average). chunks: number of
    boundaries before clipping. overflow_frac: share of them that the capacity clipped. max_slots:
    maximum number of slots needed by rows that share slots. undecided_frac: share of p in
    [0.4, 0.6]. prob_hist: counts of p in 20 bins. aux_loss: sum of the unweighted losses.
    """
    positions, chunks = (jnp.maximum(sums[name], 1.0) for name in ("positions", "chunks"))
    return {
        "boundary_rate": sums["chunks"] / positions,
        "boundary_prob": sums["prob"] / positions,
        "bytes_per_chunk": num_bytes / chunks,
        "overflow_frac": (sums["chunks"] - sums["kept"]) / chunks,
        "chunks": sums["chunks"],
        "max_slots": sums["max_slots"],
        "undecided_frac": sums["undecided"] / positions,
        "prob_hist": sums["prob_hist"],
        "aux_loss": sums["aux_loss"],
    }
