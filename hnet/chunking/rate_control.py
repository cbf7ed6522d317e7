"""A controller that holds the boundary rate of every stage and route at its target.

A rate loss of fixed weight converges where its gradient balances that of cross-entropy, which is
not at its target (arXiv 2507.07955: 6 -> 4.8). The controller changes the decision instead: a stage
with `hold_rate` adds one offset per route to the logit of p. The offset is the integral of the
relative rate error, like the weight of MrT5's loss. It changes the decision directly, so it does
not compete with cross-entropy, and it is part of the model, so inference uses the boundaries of
training. Use it late in training: held from step 0, the model learns more slowly.

While the predictor still changes, an offset that adapts within a few updates has the noise of their
batches, and an offset with a longer average lags. After the last update the predictor is constant,
and the offsets are set to quantiles of the logits of a long text (`hnet.train.exact_offsets`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hnet.chunking.boundaries import Boundaries

LIMIT = 8.0  # bound on |offset|, against integral windup if a rate does not react
MIN_CHUNKS = 30  # a route with fewer chunks keeps the controller's offset: its quantile is noisier


def hold_rates(
    params: Any,
    chunks_SR: jax.Array,
    count_SR: jax.Array,
    target_ratio_SR: Sequence[jax.Array],
    gain: jax.Array | float,
) -> Any:
    """`params` with every `boundary_offset` moved one step towards its target rate.

    chunks_SR: boundaries per stage and route in the step. count_SR: positions per stage and route;
    0 leaves the offset unchanged. target_ratio_SR: N of each stage, (R,). The error is N F - 1 with
    F = chunks / count, clipped to [-1, 1]. The step of a route with less than an equal share of the
    stage's positions is smaller, in proportion to its positions. Steps that do not depend on the
    number of positions would control the mean of the batches' rates instead of the rate over all
    batches.
    """
    spare = chunks_SR.shape[1]
    target_ratio_SR = jnp.stack(
        [jnp.pad(N_R, (0, spare - len(N_R)), constant_values=1) for N_R in target_ratio_SR]
    )
    rate_SR = chunks_SR / jnp.maximum(count_SR, 1.0)
    error_SR = jnp.clip(target_ratio_SR * rate_SR - 1, -1.0, 1.0)
    present_S1 = jnp.sum(count_SR > 0, axis=1, dtype=jnp.float32, keepdims=True)
    share_SR = count_SR / jnp.maximum(jnp.sum(count_SR, axis=1, keepdims=True), 1.0)
    step_SR = gain * jnp.minimum(share_SR * present_S1, 1.0) * error_SR

    def move(stage, leaf):
        return jnp.clip(leaf - step_SR[stage, : len(leaf)], -LIMIT, LIMIT)

    return map_offsets(move, params)


def map_offsets(function: Callable[[int, Any], Any], params: Any) -> Any:
    """`params` in which `function(stage, offsets)` replaces the offsets of each stage."""

    def replaced(path, leaf):
        names = [jax.tree_util.keystr((part,), simple=True) for part in path]
        if names[-1] != "boundary_offset":
            return leaf
        return function(names.count("main_network"), leaf)

    return jax.tree_util.tree_map_with_path(replaced, params)


def logits_without_offset(
    params: Any, routes: Sequence[Boundaries]
) -> dict[int, tuple[jax.Array, ...]]:
    """(logit of p without the offset, route) of each position, for each stage with an offset.

    Float32 and int32, (B, L) of that stage. The logit is NaN on padding and infinite where a
    boundary is forced.
    """
    found = {}

    def free(stage, offset_R):
        route = routes[stage]
        ids_BL = route.route_ids_BL
        if ids_BL is None:
            ids_BL = jnp.zeros(route.segment_ids_BL.shape, jnp.int32)
        p_BL = jnp.where(route.segment_ids_BL != 0, route.boundary_prob_BL, jnp.nan)
        found[stage] = jnp.log(p_BL) - jnp.log1p(-p_BL) - offset_R[ids_BL], ids_BL
        return offset_R

    map_offsets(free, params)
    return found


def exact_offsets(
    logit_N: np.ndarray, route_N: np.ndarray, target_ratios: Sequence[float]
) -> np.ndarray:
    """Offsets with which 1 in `target_ratio` positions of each route is a boundary.

    logit_N, route_N: logits and routes of N positions from `logits_without_offset`, no
    padding. Returns float32 (R,), NaN for a route with fewer than `MIN_CHUNKS` expected boundaries.
    """
    offset_R = np.full(len(target_ratios), np.nan, np.float32)
    for r, target_ratio in enumerate(target_ratios):
        own = np.sort(logit_N[route_N == r].astype(np.float64))
        chunks = round(len(own) / target_ratio)
        if chunks >= MIN_CHUNKS:
            below, above = np.clip(own[len(own) - chunks - 1 : len(own) - chunks + 1], -99, 99)
            offset_R[r] = np.clip(-(below + above) / 2, -LIMIT, LIMIT)
    return offset_R
