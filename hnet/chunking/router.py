"""Routers: which positions start a chunk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.layers import segment_starts


class RouterOutput(NamedTuple):
    """What one stage decided, for losses, metrics and pictures. L counts this stage's positions."""

    boundary_prob_BL: jax.Array
    """p: probability that a chunk starts here, float32; 1 at segment starts, 0 on padding"""
    boundary_mask_BL: jax.Array
    """b: the boundaries that were used, that is after clipping to the stage's capacity"""
    segment_ids_BL: jax.Array
    """segments of this stage's positions; 0 = padding"""
    num_boundaries_B: jax.Array
    """boundaries the router asked for in each row, before clipping"""

    @property
    def selected_prob_BL(self) -> jax.Array:
        """c: the router's confidence in its decision, p at boundaries and 1 - p elsewhere."""
        return jnp.where(self.boundary_mask_BL, self.boundary_prob_BL, 1 - self.boundary_prob_BL)


def cosine_boundary_prob(
    q_BLD: jax.Array, k_BLD: jax.Array, segment_ids_BL: jax.Array
) -> jax.Array:
    """p_t = (1 - cos(q_{t-1}, k_t)) / 2, and 1 at the first position of each segment.

    goombalab/hnet projects q from t-1 and k from t; arXiv 2507.07955 eq. 4 has the roles swapped.
    Padding (segment 0) gets 0. float32 throughout.
    """

    def unit(x):  # a zero vector stays zero, so its cosine is 0 and its gradient finite
        norm_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(norm_squared, 1e-24))

    cosine = jnp.sum(unit(q_BLD[:, :-1]) * unit(k_BLD[:, 1:]), axis=-1)
    p_BL = jnp.pad(jnp.clip((1 - cosine) / 2, 0.0, 1.0), ((0, 0), (1, 0)))
    p_BL = jnp.where(segment_starts(segment_ids_BL), 1.0, p_BL)
    return jnp.where(segment_ids_BL != 0, p_BL, 0.0)


class RoutingModule(nnx.Module):
    """The official cosine router: it cuts where neighbouring encoder states differ."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        def identity(_key, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        self.q_proj_layer, self.k_proj_layer = (
            nnx.Linear(d_model, d_model, use_bias=False, kernel_init=identity,
                       precision=jax.lax.Precision.HIGHEST, rngs=rngs)
            for _ in range(2)
        )  # fmt: skip

    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Boundary probabilities (B, L) of float32 states."""
        q_BLD, k_BLD = self.q_proj_layer(x_BLD), self.k_proj_layer(x_BLD)
        return cosine_boundary_prob(q_BLD, k_BLD, segment_ids_BL)


def decide(boundary_prob_BL: jax.Array, segment_ids_BL: jax.Array, capacity: int) -> RouterOutput:
    """Boundaries are p > 0.5 (strictly, as the official code); the first `capacity` a row count.

    Only the clipped mask is used downstream, so a row with too many boundaries merges the rest
    into its last chunk instead of reading slots that do not exist.
    """
    wanted_BL = boundary_prob_BL > 0.5
    rank_BL = jnp.cumsum(wanted_BL, axis=1, dtype=jnp.int32)
    kept_BL = wanted_BL & (rank_BL <= capacity)
    return RouterOutput(boundary_prob_BL, kept_BL, segment_ids_BL, rank_BL[:, -1])
