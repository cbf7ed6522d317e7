"""A controller that holds the boundary rate of every stage and route at its target.

A rate loss of fixed weight settles where its gradient balances the one of cross-entropy, which is
not at its target (arXiv 2507.07955: 6 -> 4.8). The controller moves the decision instead: a stage
with `hold_rate` has an offset for each route on the logit of p, which follows the integral of the
relative error, as the weight of MrT5's loss does. The offset acts at once and without a force
against cross-entropy, and it is part of the model, so that inference cuts as training did.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LIMIT = 8.0  # of an offset, so that a rate which cannot move winds up no further


@dataclass(frozen=True)
class ControllerConfig:
    """Holding the rate of stages with `hold_rate`."""

    gain: float = 1.0
    """how far an update moves an offset for a relative error of 1, that is at twice the target. It
    goes with the root of the learning rate's schedule: in the end the noise of batches averages
    out, and yet the offsets can follow as long as the router moves"""


def hold_rates(
    params: Any,
    chunks_SR: jax.Array,
    count_SR: jax.Array,
    target_ratio_SR: jax.Array,
    gain: jax.Array | float,
) -> Any:
    """`params` of the model with every `boundary_offset` moved towards its target rate.

    chunks_SR: boundaries of each stage and route in the step; count_SR: positions there, where 0
    leaves the offset as it is; target_ratio_SR: N. The error is N F - 1, F = chunks / count, cut to
    [-1, 1]. A route with less than its equal share of the stage's positions counts by that: a few
    positions say little, and steps that do not depend on their number would hold the mean of the
    batches' rates, which is not the rate of all batches together.
    """
    rate_SR = chunks_SR / jnp.maximum(count_SR, 1.0)
    error_SR = jnp.clip(target_ratio_SR * rate_SR - 1, -1.0, 1.0)
    present_S1 = jnp.sum(count_SR > 0, axis=1, dtype=jnp.float32, keepdims=True)
    share_SR = count_SR / jnp.maximum(jnp.sum(count_SR, axis=1, keepdims=True), 1.0)
    step_SR = gain * jnp.minimum(share_SR * present_S1, 1.0) * error_SR

    def move(path, leaf):
        names = [jax.tree_util.keystr((part,), simple=True) for part in path]
        if names[-1] != "boundary_offset":
            return leaf
        step_R = step_SR[names.count("main_network"), : len(leaf)]
        return jnp.clip(leaf - step_R, -LIMIT, LIMIT)

    return jax.tree_util.tree_map_with_path(move, params)
