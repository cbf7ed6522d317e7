"""What training minimises and what it reports: next-byte cross-entropy, rate losses, metrics."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.rate import aux_loss, boundary_rates, route_rates, target_rate
from hnet.chunking.router import RouterOutput
from hnet.config import EOS_ID, HNetConfig

PROB_BINS = 20  # of the histogram of boundary probabilities


class LossWeights(NamedTuple):
    """Traced numbers of the loss, so that a sweep over them compiles once.

    S = stages that cut, R = most routes that one of them tells apart.
    """

    target_ratio_SR: jax.Array
    """N: positions a chunk should hold"""
    aux_weight_S: jax.Array
    """alpha: weight of each stage's rate loss"""


def next_byte_nll(logits_BLV: jax.Array, input_ids_BL: jax.Array) -> jax.Array:
    """-ln p(byte t | bytes < t) at [:, t] in nats, float32; 0 at t = 0, which nothing predicts."""
    logits = logits_BLV[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, input_ids_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(jax.nn.logsumexp(logits, axis=-1) - picked, ((0, 0), (1, 0)))


def trained_targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Positions whose byte is learned: source bytes (the loss mask) and each document's EOS."""
    seen_BL = batch["segment_ids"] != 0
    same_BL = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    predicted_BL = seen_BL & jnp.pad(same_BL, ((0, 0), (1, 0)))
    return batch["loss_mask"] | (predicted_BL & (batch["input_ids"] == EOS_ID))


def scored_bytes(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Source bytes that the loss mask scores: one a position, or those of its token."""
    bytes_BL = batch.get("byte_lengths", 1)
    return jnp.sum(jnp.where(batch["loss_mask"], bytes_BL, 0), dtype=jnp.int32)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Summed nats over source bytes as bits a byte; NaN if there are none."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan


def total_loss(
    config: HNetConfig,
    logits_BLV: jax.Array,
    routes: list[RouterOutput],
    batch: Mapping[str, jax.Array],
    weights: LossWeights,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats plus weighted rate losses, and metrics as a flat dict.

    `loss/ce` is the mean over all learned targets; `nats` and `bytes` are sums over source bytes
    alone (`batch["loss_mask"]`), whose quotient is bits per byte. All means are over the global
    batch. `batch["labels"]` (B, L) are
    boundaries to learn, where a stage asks for given ones.
    """
    nll_BL = next_byte_nll(logits_BLV, batch["input_ids"])
    trained_BL = trained_targets(batch)
    num_trained = jnp.maximum(jnp.sum(trained_BL, dtype=jnp.float32), 1.0)
    ce = jnp.sum(jnp.where(trained_BL, nll_BL, 0.0)) / num_trained
    metrics = {
        "loss/ce": ce,
        "nats": jnp.sum(jnp.where(batch["loss_mask"], nll_BL, 0.0)),
        "bytes": scored_bytes(batch),
    }
    loss = ce
    num_bytes = jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32)
    for s, (stage, route) in enumerate(zip(config.stages, routes)):
        rate_loss = aux_loss(
            stage.chunking, route, weights.target_ratio_SR[s],
            logits_BLV=logits_BLV, labels_BL=batch.get("labels"),
        )  # fmt: skip
        loss += weights.aux_weight_S[s] * rate_loss
        found = {**stage_metrics(route, num_bytes), "aux_loss": rate_loss}
        targets_R = weights.target_ratio_SR[s, : stage.chunking.routes]
        found["target_rate"] = target_rate(route, targets_R)
        if stage.chunking.routes > 1:
            found |= route_metrics(route, config.route_names)
        metrics |= {f"stage{s}/{name}": value for name, value in found.items()}
    return loss, metrics | {"loss/total": loss}


def route_metrics(route: RouterOutput, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Boundary rate and positions a chunk of each route; 0 for one without positions."""
    F_R, _, n_R = route_rates(route, len(names))
    found = {}
    for r, name in enumerate(names):
        found[f"route_{name}/boundary_rate"] = F_R[r]
        chunks = jnp.maximum(F_R[r] * n_R[r], 1.0)
        found[f"route_{name}/positions_per_chunk"] = n_R[r] / chunks
    return found


def stage_metrics(route: RouterOutput, num_bytes: jax.Array) -> dict[str, jax.Array]:
    """What one stage did with a batch.

    boundary_rate = chunks a position of this stage (F), boundary_prob its mean probability (G),
    bytes_per_chunk = source and separator bytes a chunk (micro-averaged), overflow_frac = share of
    the wanted boundaries (chunks) that the capacity clipped, max_slots = most that was wanted of a
    row of slots, undecided_frac = share of p in [0.4, 0.6], prob_hist = counts of p in 20 bins.
    """
    F, G = boundary_rates(route)
    p_BL, valid_BL = route.boundary_prob_BL, route.segment_ids_BL != 0
    wanted = jnp.sum(route.num_boundaries_B, dtype=jnp.float32)
    kept = jnp.sum(route.boundary_mask_BL, dtype=jnp.float32)
    undecided_BL = valid_BL & (p_BL >= 0.4) & (p_BL <= 0.6)
    bin_BL = jnp.where(valid_BL, jnp.minimum(p_BL * PROB_BINS, PROB_BINS - 1), -1)
    bins = jnp.arange(PROB_BINS, dtype=jnp.int32)
    in_bin = bin_BL.astype(jnp.int32)[..., None] == bins[None, None, :]
    return {
        "boundary_rate": F,
        "boundary_prob": G,
        "bytes_per_chunk": num_bytes / jnp.maximum(wanted, 1.0),
        "overflow_frac": (wanted - kept) / jnp.maximum(wanted, 1.0),
        "chunks": wanted,
        "max_slots": jnp.max(route.num_slots_G),
        "undecided_frac": jnp.mean(undecided_BL) / jnp.maximum(jnp.mean(valid_BL), 1e-9),
        "prob_hist": jnp.sum(in_bin, axis=(0, 1), dtype=jnp.int32),
    }
