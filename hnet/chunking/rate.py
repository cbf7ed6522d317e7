"""Losses that hold the rate of boundaries, over a whole batch or for each route."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import gammaln

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.router import RouterOutput
from hnet.config import HNetConfig
from hnet.nn.layers import segment_starts

MIN_PROB = 1e-6  # of p as a target of cross-entropy, where a router has no logit
SOFT = 0.1  # logits over which `row_rate_error` counts a boundary softly


class RateCounts(NamedTuple):
    """Float32 (R,) counts of each route in some rows, or (S, R) of every stage that cuts.

    They add up over the parts of a batch, and their quotients are its rates.
    """

    chunks_R: jax.Array
    """boundaries that the router asked for, also where the capacity clipped them"""
    positions_R: jax.Array
    """valid positions"""
    starts_R: jax.Array
    """valid positions that start a segment"""

    @property
    def rate_R(self) -> jax.Array:
        """F: boundaries per valid position, forced ones included; 0 for an absent route."""
        return self.chunks_R / jnp.maximum(self.positions_R, 1.0)


def rate_counts(route: RouterOutput, num_routes: int) -> RateCounts:
    """The counts of one stage."""
    on_BLR = positions_on_route(route, num_routes)

    def count(which_BL):
        return jnp.sum(on_BLR & which_BL[..., None], axis=(0, 1), dtype=jnp.float32)

    ids_BL = route.segment_ids_BL
    return RateCounts(count(route.boundary_BL > 0.5), count(ids_BL != 0),
                      count(segment_starts(ids_BL)))  # fmt: skip


def boundary_rates(route: RouterOutput) -> tuple[jax.Array, jax.Array]:
    """(F, G): share of boundaries and mean boundary probability over all valid positions."""
    F_R, G_R, _ = route_rates(route, 1)
    return F_R[0], G_R[0]


def route_rates(route: RouterOutput, num_routes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(F, G, valid positions) of each route, (R,) float32; an absent route has 0, 0, 0."""
    counts = rate_counts(route, num_routes)
    return counts.rate_R, _mean_prob(route, counts), counts.positions_R


def _mean_prob(route: RouterOutput, counts: RateCounts) -> jax.Array:
    on_BLR = positions_on_route(route, len(counts.positions_R))
    sum_R = _sums(route.boundary_prob_BL, on_BLR, (0, 1))
    return sum_R / jnp.maximum(counts.positions_R, 1.0)


def target_rate(positions_R: jax.Array, target_ratio_R: jax.Array) -> jax.Array:
    """Boundary rate of a batch if every route cut at its target."""
    return jnp.sum(positions_R / target_ratio_R) / jnp.maximum(jnp.sum(positions_R), 1.0)


def counts_by_stage(config: HNetConfig, routes: list[RouterOutput]) -> RateCounts:
    """The counts of every stage that cuts, float32 (S, R)."""
    rows = []
    for stage, route in zip(config.stages, routes):
        counts = rate_counts(route, stage.chunking.routes)
        spare = (0, config.num_routes - stage.chunking.routes)
        rows.append(jax.tree.map(lambda n_R, spare=spare: jnp.pad(n_R, spare), counts))
    return jax.tree.map(lambda *n_R: jnp.stack(n_R), *rows)


def positions_on_route(route: RouterOutput, num_routes: int) -> jax.Array:
    """Valid positions of each route, bool (B, L, R)."""
    valid_BL1 = (route.segment_ids_BL != 0)[..., None]
    if num_routes == 1:
        return valid_BL1
    routes = jnp.arange(num_routes, dtype=jnp.int32)[None, None, :]
    return valid_BL1 & (route.route_ids_BL[..., None] == routes)


def _sums(values_BL: jax.Array, on_BLR: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.where(on_BLR, values_BL[..., None], 0.0), axis=axes)


def ratio_loss(F: jax.Array, G: jax.Array, target_ratio: jax.Array | float) -> jax.Array:
    """N / (N-1) * ((N-1) F G + (1-F) (1-G)), 1 at F = G = 1/N (arXiv 2507.07955, eq. 10).

    Only G carries a gradient: N / (N-1) * (N F - 1).
    """
    N = target_ratio
    return N / (N - 1) * ((N - 1) * F * G + (1 - F) * (1 - G))


def row_rate_error(route: RouterOutput, target_ratio: jax.Array, threshold: jax.Array) -> jax.Array:
    """Mean over rows of (N F - 1)^2, F = mean of sigmoid((logit of p - threshold) / SOFT).

    Unlike the ratio loss it wants the target from each row alone, and its gradient comes from
    the positions that are about to turn.
    """
    valid_BL = route.segment_ids_BL != 0
    p_BL = jnp.clip(route.boundary_prob_BL, MIN_PROB, 1 - MIN_PROB)
    soft_BL = jax.nn.sigmoid((jnp.log(p_BL) - jnp.log1p(-p_BL) - threshold) / SOFT)
    n_B = jnp.sum(valid_BL, axis=1, dtype=jnp.float32)
    F_B = jnp.sum(soft_BL, axis=1) / jnp.maximum(n_B, 1.0)  # p is 0 on padding
    error_B = jnp.where(n_B > 0, jnp.square(target_ratio * F_B - 1), 0.0)
    return jnp.sum(error_B) / jnp.maximum(jnp.sum(n_B > 0, dtype=jnp.float32), 1.0)


def binomial_nll(k: jax.Array, n: jax.Array, rate: jax.Array) -> jax.Array:
    """-log Binomial(k; n, rate) in nats, by the gamma function (arXiv 2211.09761, section 3.1)."""
    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return -(choose + k * jnp.log(rate) + (n - k) * jnp.log1p(-rate))


def hinge(rate: jax.Array, highest: jax.Array, lowest: jax.Array) -> jax.Array:
    """Distance of the rate from [lowest, highest], without gradient inside (arXiv 2507.12720)."""
    return jax.nn.relu(rate - highest) + jax.nn.relu(lowest - rate)


def boundary_cross_entropy(
    route: RouterOutput, labels_BL: jax.Array, *, reference_double_sigmoid: bool = False
) -> jax.Array:
    """-log p(label) in nats at each position, (B, L).

    The dynamic-pooling code gives probabilities to a function that expects logits; with
    `reference_double_sigmoid` so does this.
    """
    logit_BL = route.boundary_logit_BL
    p_BL = route.boundary_prob_BL
    if reference_double_sigmoid:
        logit_BL = p_BL
    elif logit_BL is None:
        p_BL = jnp.clip(p_BL, MIN_PROB, 1 - MIN_PROB)
        logit_BL = jnp.log(p_BL) - jnp.log1p(-p_BL)
    return optax.sigmoid_binary_cross_entropy(logit_BL, labels_BL.astype(jnp.float32))


def entropy_spikes(logits_BLV: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Positions whose next-byte entropy exceeds that of the two before it, bool (B, L).

    Fewer than two exist at the start of a segment: the first position is one, the second has one
    to exceed (arXiv 2211.09761, section 3.2). Comparisons carry no gradient.
    """
    log_p = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    entropy_BL = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    spikes_BL = segment_ids_BL != 0
    for back in (1, 2):
        before_BL = jnp.pad(entropy_BL[:, :-back], ((0, 0), (back, 0)))
        same_BL = segment_ids_BL[:, back:] == segment_ids_BL[:, :-back]
        same_BL = jnp.pad(same_BL, ((0, 0), (back, 0)))
        spikes_BL &= ~same_BL | (entropy_BL > before_BL)
    return spikes_BL


def aux_loss(
    chunking: ChunkingConfig,
    route: RouterOutput,
    target_ratio_R: jax.Array,
    *,
    logits_BLV: jax.Array | None = None,
    labels_BL: jax.Array | None = None,
    whole: RateCounts | None = None,
) -> jax.Array:
    """The rate loss of one stage, before its weight: a mean over its routes.

    target_ratio_R: N of each route (traced; a row of `config.target_ratios()`). logits_BLV: output
    of the model, where labels are spikes of its entropy; labels_BL: bool, where they are given.
    whole: counts of the batch of which these rows are a part (default: they are all of it). The
    losses of its parts, and their gradients, then add up to those of the batch.

    A route counts by its share of the valid positions, so that a byte's rate loss and its
    cross-entropy have the same proportion in every route; `aux_average="routes"` counts the routes
    that are present alike, as MAGNET does with its scripts. Binomial and hinge are taken for the
    positions of a route in one row (arXiv 2211.09761), and rows count by those positions; the ratio
    is of all rows together (arXiv 2507.07955).
    """
    R = chunking.routes
    own = rate_counts(route, R)
    whole = own if whole is None else whole
    loss_R = _loss_by_route(
        chunking, route, target_ratio_R[:R], own, whole, logits_BLV, labels_BL
    )  # fmt: skip
    n_R = whole.positions_R
    weight_R = n_R if chunking.aux_average == "positions" else (n_R > 0).astype(jnp.float32)
    share_R = weight_R / jnp.maximum(jnp.sum(weight_R), 1.0)  # exactly 1 if there is one route
    return jnp.sum(jnp.where(own.positions_R > 0, loss_R * share_R, 0.0))


def _loss_by_route(
    chunking: ChunkingConfig,
    route: RouterOutput,
    target_ratio_R: jax.Array,
    own: RateCounts,
    whole: RateCounts,
    logits_BLV: jax.Array | None,
    labels_BL: jax.Array | None,
) -> jax.Array:
    """What the positions of these rows contribute to the mean over those of the whole batch."""
    on_BLR = positions_on_route(route, chunking.routes)
    part_R = own.positions_R / jnp.maximum(whole.positions_R, 1.0)
    rate_R = 1 / target_ratio_R

    def over_rows(value_BR, n_BR):  # mean over rows, each by its positions
        own_R = jnp.sum(value_BR * n_BR, axis=0) / jnp.maximum(jnp.sum(n_BR, axis=0), 1.0)
        return part_R * own_R

    def counts():  # boundaries and positions of each row and route
        return _sums(route.boundary_BL, on_BLR, (1,)), jnp.sum(on_BLR, axis=1, dtype=jnp.float32)

    match chunking.aux_loss:
        case "ratio":  # linear in G, and only G has a gradient
            return part_R * ratio_loss(whole.rate_R, _mean_prob(route, own), target_ratio_R)
        case "binomial":
            k_BR, n_BR = counts()
            nll_BR = binomial_nll(k_BR, n_BR, rate_R[None, :])
            return over_rows(nll_BR / jnp.maximum(n_BR, 1.0), n_BR)
        case "hinge":
            k_BR, n_BR = counts()
            highest_1R = rate_R[None, :]
            lowest_1R = highest_1R * (1 - chunking.hinge_band)
            return over_rows(hinge(k_BR / jnp.maximum(n_BR, 1.0), highest_1R, lowest_1R), n_BR)
        case "bce":
            if chunking.labels == "entropy":
                labels_BL = entropy_spikes(logits_BLV, route.segment_ids_BL)
            nats_BL = boundary_cross_entropy(
                route, labels_BL, reference_double_sigmoid=chunking.reference_double_sigmoid
            )
            n_R = whole.positions_R
            if chunking.alignment == "start":  # a boundary there is no prediction
                on_BLR &= ~segment_starts(route.segment_ids_BL)[..., None]
                n_R = n_R - whole.starts_R
            return _sums(nats_BL, on_BLR, (0, 1)) / jnp.maximum(n_R, 1.0)
        case "none":
            return jnp.zeros_like(target_ratio_R)
        case unknown:
            raise ValueError(f"aux_loss={unknown!r} is unknown")
