"""The spike rule: updates whose loss or gradient norm is far above its running mean are skipped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST_SHARE = 1e-3
"""least deviation, as a share of the mean: a loss that hardly moves has no spikes"""


class Spikes(NamedTuple):
    """Statistics of the loss and of the gradient norm (K = 2), part of the train state."""

    seen: jax.Array
    """number of updates with finite numbers so far, int32"""
    mean_K: jax.Array
    var_K: jax.Array
    skipped: jax.Array
    """number of updates skipped by the rule so far, int32"""


def no_spikes() -> Spikes:
    """State before the first update."""
    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros((2,))
    return Spikes(zero, zeros, zeros, zero)


def watch(
    state: Spikes, x_K: jax.Array, deviations: jax.Array, window: int
) -> tuple[jax.Array, Spikes]:
    """(whether to skip this update, next state). x_K: loss and gradient norm of this update.

    An update is skipped if one of them is more than `deviations` standard deviations above its
    mean, but none of the first `window` updates is. Mean and variance are those of all updates up
    to `window`, then exponential averages with that memory (recursions of West, 1979). A spike
    counts in them with the value of the threshold: after a lasting change of level the threshold
    therefore rises until updates are accepted again. With x_K not finite nothing is changed, and
    the update is no spike.
    """
    is_finite = jnp.all(jnp.isfinite(x_K))
    std_K = jnp.maximum(jnp.sqrt(state.var_K), LEAST_SHARE * jnp.abs(state.mean_K))
    most_K = state.mean_K + deviations * std_K
    is_spike = (state.seen >= window) & jnp.any(x_K > most_K) & is_finite
    x_K = jnp.where(state.seen >= window, jnp.minimum(x_K, most_K), x_K)
    share = 1 / jnp.minimum(state.seen + 1, window).astype(jnp.float32)
    off_K = x_K - state.mean_K
    new = Spikes(
        state.seen + 1,
        state.mean_K + share * off_K,
        (1 - share) * (state.var_K + share * off_K**2),
        state.skipped + is_spike.astype(jnp.int32),
    )
    return is_spike, jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, state)
