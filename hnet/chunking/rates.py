"""Boundary rates of a whole batch and per route (script group)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Boundaries
from hnet.nn.layers import segment_starts

MIN_PROB = 1e-6  # clip of p before its logit is computed, if the predictor has no logit
SOFT = 0.1  # width in logits of the soft threshold of `row_rate_error`


class RateCounts(NamedTuple):
    """Counts per route for some rows, float32 (R,), or for every stage that chunks, (S, R).

    The counts of the parts of a batch add up to those of the batch; its rates are their quotients.
    """

    chunks_R: jax.Array
    """number of boundaries before clipping to the capacity"""
    positions_R: jax.Array
    """number of valid positions"""
    starts_R: jax.Array
    """number of valid positions that start a segment"""

    @property
    def rate_R(self) -> jax.Array:
        """F: boundaries per valid position, forced ones included; 0 for an absent route."""
        return self.chunks_R / jnp.maximum(self.positions_R, 1.0)


def rate_counts(boundaries: Boundaries, num_routes: int) -> RateCounts:
    """Counts of one stage, (R,)."""
    on_BLR = positions_on_route(boundaries, num_routes)

    def count(which_BL):
        return jnp.sum(on_BLR & which_BL[..., None], axis=(0, 1), dtype=jnp.float32)

    ids_BL = boundaries.segment_ids_BL
    return RateCounts(count(boundaries.boundary_ste_BL > 0.5), count(ids_BL != 0),
                      count(segment_starts(ids_BL)))  # fmt: skip


def boundary_rates(boundaries: Boundaries) -> tuple[jax.Array, jax.Array]:
    """(F, G): share of boundaries and mean boundary probability over all valid positions."""
    F_R, G_R, _ = route_rates(boundaries, 1)
    return F_R[0], G_R[0]


def route_rates(boundaries: Boundaries, num_routes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(F, G, valid positions) of each route, (R,) float32; an absent route has 0, 0, 0."""
    counts = rate_counts(boundaries, num_routes)
    return counts.rate_R, mean_prob(boundaries, counts), counts.positions_R


def mean_prob(boundaries: Boundaries, counts: RateCounts) -> jax.Array:
    """G: mean boundary probability of each route, (R,)."""
    on_BLR = positions_on_route(boundaries, len(counts.positions_R))
    sum_R = sums_over(boundaries.boundary_prob_BL, on_BLR, (0, 1))
    return sum_R / jnp.maximum(counts.positions_R, 1.0)


def target_rate(positions_R: jax.Array, target_ratio_R: jax.Array) -> jax.Array:
    """Boundary rate of a batch if every route had its target rate."""
    return jnp.sum(positions_R / target_ratio_R) / jnp.maximum(jnp.sum(positions_R), 1.0)


def counts_by_stage(records: list[Boundaries], routes: tuple[int, ...]) -> RateCounts:
    """The counts of every stage that chunks, float32 (S, R).

    routes: number of routes per stage. Stages with fewer than the maximum are padded with zeros.
    """
    rows = []
    for boundaries, num_routes in zip(records, routes):
        spare = (0, max(routes) - num_routes)
        counts = rate_counts(boundaries, num_routes)
        rows.append(jax.tree.map(lambda n_R, spare=spare: jnp.pad(n_R, spare), counts))
    return jax.tree.map(lambda *n_R: jnp.stack(n_R), *rows)


def positions_on_route(boundaries: Boundaries, num_routes: int) -> jax.Array:
    """Valid positions of each route, bool (B, L, R)."""
    valid_BL1 = (boundaries.segment_ids_BL != 0)[..., None]
    if num_routes == 1:
        return valid_BL1
    routes = jnp.arange(num_routes, dtype=jnp.int32)[None, None, :]
    return valid_BL1 & (boundaries.route_ids_BL[..., None] == routes)


def sums_over(values_BL: jax.Array, on_BLR: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums of values over the positions of each route; axes: axes of (B, L, R) to sum over."""
    return jnp.sum(jnp.where(on_BLR, values_BL[..., None], 0.0), axis=axes)


def row_rate_error(
    boundaries: Boundaries, target_ratio: jax.Array, threshold: jax.Array
) -> jax.Array:
    """Mean over rows of (N F - 1)^2, F = mean of sigmoid((logit of p - threshold) / SOFT).

    Unlike the ratio loss it has the target rate for each row, and its gradient comes from positions
    close to the threshold.
    """
    valid_BL = boundaries.segment_ids_BL != 0
    p_BL = jnp.clip(boundaries.boundary_prob_BL, MIN_PROB, 1 - MIN_PROB)
    soft_BL = jax.nn.sigmoid((jnp.log(p_BL) - jnp.log1p(-p_BL) - threshold) / SOFT)
    n_B = jnp.sum(valid_BL, axis=1, dtype=jnp.float32)
    F_B = jnp.sum(soft_BL, axis=1) / jnp.maximum(n_B, 1.0)  # p is 0 on padding
    error_B = jnp.where(n_B > 0, jnp.square(target_ratio * F_B - 1), 0.0)
    return jnp.sum(error_B) / jnp.maximum(jnp.sum(n_B > 0, dtype=jnp.float32), 1.0)


def mean_over_routes(
    loss_R: jax.Array, own: RateCounts, whole: RateCounts, average: str
) -> jax.Array:
    """Mean over routes of `loss_R`, the contribution of some rows to each route's loss.

    own, whole: counts of these rows and of the batch that they are part of. average: "positions"
    weights a route by its valid positions, so the ratio of rate loss to cross-entropy per byte is
    the same in every route; "routes" weights all present routes equally, as MAGNET does with
    scripts (arXiv 2407.08818).
    """
    n_R = whole.positions_R
    weight_R = n_R if average == "positions" else (n_R > 0).astype(jnp.float32)
    share_R = weight_R / jnp.maximum(jnp.sum(weight_R), 1.0)  # exactly 1 if there is one route
    return jnp.sum(jnp.where(own.positions_R > 0, loss_R * share_R, 0.0))


def share_of(own: RateCounts, whole: RateCounts) -> jax.Array:
    """Share of the batch's positions on each route that lie in these rows, (R,)."""
    return own.positions_R / jnp.maximum(whole.positions_R, 1.0)


def counts_by_row(boundaries: Boundaries, num_routes: int) -> tuple[jax.Array, jax.Array]:
    """(boundaries with gradient, valid positions) per row and route, float32 (B, R)."""
    on_BLR = positions_on_route(boundaries, num_routes)
    k_BR = sums_over(boundaries.boundary_ste_BL, on_BLR, (1,))
    return k_BR, jnp.sum(on_BLR, axis=1, dtype=jnp.float32)


def mean_over_rows(value_BR: jax.Array, n_BR: jax.Array) -> jax.Array:
    """Mean over rows for each route, (R,); rows are weighted by their positions on the route."""
    return jnp.sum(value_BR * n_BR, axis=0) / jnp.maximum(jnp.sum(n_BR, axis=0), 1.0)
