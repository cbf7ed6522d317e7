"""A controller that holds the boundary rate of every stage and route at its target.

A rate loss of fixed weight settles where its gradient balances the one of cross-entropy, which is
not at its target (arXiv 2507.07955: 6 -> 4.8). The controller adds a pressure on the boundary
probability whose integral grows until the error is gone, as the PI controller of MrT5 does with
the weight of its loss; unlike a weight, a pressure also acts where the rate loss is flat, and both
ways.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

SMOOTHING = 0.9  # of the proportional part, as MrT5
LIMIT = 4.0  # of the integral, so that a rate which cannot move winds up no further


@dataclass(frozen=True)
class ControllerConfig:
    """Holding the boundary rate at its target while training. Off: the official rate loss alone."""

    enabled: bool = False
    """add the controller's pressure to the rate losses"""
    proportional: float = 0.5
    """pressure for a relative error of 1, that is for twice the target rate"""
    integral: float = 0.01
    """growth of the pressure a step for the same error"""


class ControllerState(NamedTuple):
    """What the controller remembers; part of the train state, unchanged by evaluation."""

    proportional_SR: jax.Array
    integral_SR: jax.Array

    @property
    def pressure_SR(self) -> jax.Array:
        """What `aux_loss` takes, a row a stage; above 0 it presses towards fewer boundaries."""
        return self.proportional_SR + self.integral_SR


def controller_init(num_stages: int, num_routes: int) -> ControllerState:
    """No pressure. num_stages: those that cut; num_routes: the most of any stage."""
    zeros = jnp.zeros((num_stages, num_routes), jnp.float32)
    return ControllerState(zeros, zeros)


def controller_update(
    state: ControllerState,
    rate_SR: jax.Array,
    count_SR: jax.Array,
    target_ratio_SR: jax.Array,
    *,
    proportional: jax.Array | float,
    integral: jax.Array | float,
) -> ControllerState:
    """The state after a step.

    rate_SR: boundaries a position (F) of each stage and route in the step; count_SR: positions
    behind it, where 0 leaves the state as it is; target_ratio_SR: N. The error is N F - 1, cut to
    [-1, 1].
    """
    error_SR = jnp.clip(target_ratio_SR * rate_SR - 1, -1.0, 1.0)
    proportional_SR = SMOOTHING * state.proportional_SR + (1 - SMOOTHING) * proportional * error_SR
    integral_SR = jnp.clip(state.integral_SR + integral * error_SR, -LIMIT, LIMIT)
    present_SR = count_SR > 0
    return ControllerState(
        jnp.where(present_SR, proportional_SR, state.proportional_SR),
        jnp.where(present_SR, integral_SR, state.integral_SR),
    )
