"""Routers: which positions are boundaries, and how sure of it a learned one is."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.config import Alignment, ChunkingConfig
from hnet.chunking.routes import stack_routes
from hnet.nn.layers import INIT_STD, matmul, segment_starts
from hnet.nn.parameters import metadata

HIGHEST = jax.lax.Precision.HIGHEST


class RouterOutput(NamedTuple):
    """What one stage decided, for losses, metrics and pictures. L counts this stage's positions."""

    boundary_prob_BL: jax.Array
    """p: probability of a boundary, float32; 0 on padding; 1 at segment starts (alignment start)"""
    boundary_mask_BL: jax.Array
    """b: the boundaries that were used, that is after clipping to the stage's capacity"""
    segment_ids_BL: jax.Array
    """segments of this stage's positions; 0 = padding"""
    num_boundaries_B: jax.Array
    """boundaries the router asked for in each row, before clipping"""
    num_slots_G: jax.Array
    """slots each row of slots was asked for, before clipping, which a capacity has to hold: the
    boundaries of the rows that share it and, with alignment end, a null slot for each segment"""
    boundary_BL: jax.Array
    """b before clipping, float32, with the gradient of what was compared with the threshold"""
    boundary_logit_BL: jax.Array | None = None
    """logit of p, from a router that has one"""
    route_ids_BL: jax.Array | None = None
    """route of each position, int32; None = routes are not told apart"""

    @property
    def packed_rows(self) -> int:
        """Rows that share a row of slots."""
        return self.segment_ids_BL.shape[0] // self.num_slots_G.shape[0]

    @property
    def selected_prob_BL(self) -> jax.Array:
        """c: the router's confidence in its decision, p at boundaries and 1 - p elsewhere."""
        return jnp.where(self.boundary_mask_BL, self.boundary_prob_BL, 1 - self.boundary_prob_BL)


def half_cosine_distance(q_XD: jax.Array, k_XD: jax.Array) -> jax.Array:
    """(1 - cos(q, k)) / 2 over the last axis, in [0, 1]."""

    def unit(x):  # a zero vector stays zero, so its cosine is 0 and its gradient finite
        norm_squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(norm_squared, 1e-24))

    return jnp.clip((1 - jnp.sum(unit(q_XD) * unit(k_XD), axis=-1)) / 2, 0.0, 1.0)


def previous(x_BLD: jax.Array) -> jax.Array:
    """The state one position to the left; zeros at the first."""
    return jnp.pad(x_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))


def shift_logit(p: jax.Array, offset: jax.Array) -> jax.Array:
    """sigmoid(logit(p) + offset), without the logit: 0 and 1 stay what they are."""
    odds = p * jnp.exp(offset)
    return odds / (1 - p + odds)


class RoutingModule(nnx.Module):
    """The official cosine router: it cuts where neighbouring encoder states differ.

    p_t = (1 - cos(q_{t-1}, k_t)) / 2. goombalab/hnet projects q from t-1 and k from t; arXiv
    2507.07955 eq. 4 has the roles swapped. float32 throughout.
    """

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        def identity(_key, shape, dtype):
            return jnp.eye(*shape, dtype=dtype)

        self.q_proj_layer, self.k_proj_layer = (
            nnx.Linear(d_model, d_model, use_bias=False, kernel_init=identity, rngs=rngs,
                       kernel_metadata=metadata("embed out"),
                       dot_general=lambda x, weight, *_, **__: matmul(x, weight, HIGHEST))
            for _ in range(2)
        )  # fmt: skip

    def __call__(self, previous_XD: jax.Array, x_XD: jax.Array) -> jax.Array:
        """p of positions, from their states and the states one position to their left."""
        return half_cosine_distance(self.q_proj_layer(previous_XD), self.k_proj_layer(x_XD))


class BoundaryPredictor(nnx.Module):
    """The MLP of dynamic token pooling (arXiv 2211.09761): logit = fc2(gelu(fc1(h))), float32."""

    def __init__(self, d_model: int, d_hidden: int, *, rngs: nnx.Rngs):
        def layer(d_in, d_out, axes):
            return nnx.Linear(
                d_in, d_out, kernel_init=nnx.initializers.normal(INIT_STD),
                precision=HIGHEST, rngs=rngs,
                kernel_metadata=metadata(axes), bias_metadata=metadata("out", decay=False),
            )  # fmt: skip

        self.fc1 = layer(d_model, d_hidden, "embed_fused out")
        self.fc2 = layer(d_hidden, 1, "mlp out")

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Logits of p of positions, from their states."""
        return self.fc2(jax.nn.gelu(self.fc1(x_XD), approximate=False))[..., 0]


def make_router(chunking: ChunkingConfig, d_model: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """The learned part of a stage's router, stacked over routes; None for rules.

    The MLP's last bias starts at the logit of the target rate 1/N of its route: from 0, half of all
    positions, small targets are reached only by overshooting to no boundaries at all.
    """
    routes = chunking.num_predictors
    match chunking.router:
        case "cosine":
            return stack_routes(lambda rngs: RoutingModule(d_model, rngs=rngs), routes, rngs)
        case "mlp":
            hidden = chunking.mlp_width or 4 * d_model
            make = lambda rngs: BoundaryPredictor(d_model, hidden, rngs=rngs)
            router = stack_routes(make, routes, rngs)
            logits = [-math.log(N - 1) for N in chunking.target_ratios[:routes]]
            bias = router.fc2.bias
            bias[...] = jnp.asarray(logits, jnp.float32).reshape(bias.shape)
            return router
        case _:
            return None


def relaxed_bernoulli(
    logit_BL: jax.Array, temperature: jax.Array | float, key: jax.Array | None
) -> jax.Array:
    """sigmoid((logit + noise) / temperature), noise = log u - log(1 - u); none without a key.

    Above 0.5 with probability sigmoid(logit) (arXiv 1611.00712); without noise, where p > 0.5.
    """
    if key is not None:
        logit_BL = logit_BL + jax.random.logistic(key, logit_BL.shape, jnp.float32)
    return jax.nn.sigmoid(logit_BL / temperature)


def decide(
    boundary_prob_BL: jax.Array,
    segment_ids_BL: jax.Array,
    capacity: int,
    *,
    alignment: Alignment = "start",
    compared_BL: jax.Array | None = None,
    boundary_logit_BL: jax.Array | None = None,
    route_ids_BL: jax.Array | None = None,
    packed_rows: int = 1,
) -> RouterOutput:
    """Boundaries lie where p > 0.5 (strictly, as the official code), as far as the slots reach.

    compared_BL: what is compared with 0.5 in the place of p, that is a relaxed sample. With
    alignment start the first position of each segment is a boundary. `packed_rows` rows share
    `capacity` slots, first come, first served. Only the clipped mask is used downstream: in a row
    that wants more than there are, what follows is merged into the last chunk instead of reading
    slots that do not exist; a row that finds none gets nothing from the main network.
    """
    starts_BL = segment_starts(segment_ids_BL) & (segment_ids_BL != 0)

    def bounded(a_BL):
        if alignment == "start":
            a_BL = jnp.where(starts_BL, 1.0, a_BL)
        return jnp.where(segment_ids_BL != 0, a_BL, 0.0)

    p_BL = bounded(boundary_prob_BL)
    compared_BL = p_BL if compared_BL is None else bounded(compared_BL)
    wanted_BL = compared_BL > 0.5
    opened_BL = wanted_BL.astype(jnp.int32)
    num_boundaries_B = jnp.sum(opened_BL, axis=1, dtype=jnp.int32)
    if alignment == "end":
        opened_BL = opened_BL + starts_BL.astype(jnp.int32)
    slots_GP = jnp.cumsum(side_by_side(opened_BL, packed_rows), axis=1, dtype=jnp.int32)
    straight_through_BL = wanted_BL.astype(jnp.float32) + (
        compared_BL - jax.lax.stop_gradient(compared_BL)
    )
    return RouterOutput(
        p_BL,
        wanted_BL & (slots_GP <= capacity).reshape(wanted_BL.shape),
        segment_ids_BL,
        num_boundaries_B,
        slots_GP[:, -1],
        straight_through_BL,
        boundary_logit_BL,
        route_ids_BL,
    )


def side_by_side(a_BL: jax.Array, rows: int) -> jax.Array:
    """Each `rows` neighbouring rows as one, (B / rows, rows * L, ...)."""
    return a_BL.reshape(-1, rows * a_BL.shape[1], *a_BL.shape[2:])


def pack_rows(h_BLD: jax.Array, route: RouterOutput) -> tuple[jax.Array, RouterOutput]:
    """States and decisions with the rows that share slots side by side, as documents of one row.

    Their segments stay apart, so everything inside goes on as in any packed row. What a row gets
    depends on the rows before it only by where its slots lie.
    """
    rows = route.packed_rows
    if rows == 1:
        return h_BLD, route
    B, L = route.segment_ids_BL.shape
    first_B1 = (L + 1) * (jnp.arange(B, dtype=jnp.int32) % rows)[:, None]
    ids_BL = jnp.where(route.segment_ids_BL != 0, route.segment_ids_BL + first_B1, 0)
    by_position = {
        name: side_by_side(a, rows)
        for name, a in route._replace(segment_ids_BL=ids_BL)._asdict().items()
        if name.endswith("_BL") and a is not None
    }
    return side_by_side(h_BLD, rows), route._replace(**by_position)
