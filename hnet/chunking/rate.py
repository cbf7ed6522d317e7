"""Losses that hold the rate of boundaries."""

import jax
import jax.numpy as jnp

from hnet.chunking.router import RouterOutput


def boundary_rates(route: RouterOutput) -> tuple[jax.Array, jax.Array]:
    """(F, G): share of boundaries and mean boundary probability over all valid positions.

    Both are means over the global batch, forced first positions included. F counts what the router
    asked for, also where the capacity clipped it.
    """
    valid_BL = route.segment_ids_BL != 0
    num_valid = jnp.maximum(jnp.sum(valid_BL, dtype=jnp.float32), 1.0)
    F = jnp.sum(route.num_boundaries_B, dtype=jnp.float32) / num_valid
    G = jnp.sum(jnp.where(valid_BL, route.boundary_prob_BL, 0.0)) / num_valid
    return F, G


def ratio_loss(F: jax.Array, G: jax.Array, target_ratio: jax.Array | float) -> jax.Array:
    """N / (N-1) * ((N-1) F G + (1-F) (1-G)), 1 at F = G = 1/N (arXiv 2507.07955, eq. 10).

    Only G carries a gradient: N / (N-1) * (N F - 1).
    """
    N = target_ratio
    return N / (N - 1) * ((N - 1) * F * G + (1 - F) * (1 - G))
