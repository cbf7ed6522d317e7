"""Boundaries: a predictor's output, the decisions of a stage, and rows that share chunk slots."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hnet.nn.context import Context
from hnet.nn.layers import segment_starts

Alignment = Literal["start", "end"]


class Prediction(NamedTuple):
    """Output of a boundary predictor, (B, L) or (R,): a logit of p, or p itself."""

    logit: jax.Array | None = None
    """logit of p, float32"""
    prob: jax.Array | None = None
    """p, float32, from a predictor without a logit"""
    extra: Any = None
    """arrays (B, L, ...) or (R, ...) for a pool or a loss that is written for this predictor"""
    levels: jax.Array | None = None
    """level of each position, int32, from a rule that gives the boundaries of several stages"""

    def shifted(self, offset: jax.Array | None) -> "Prediction":
        """The prediction with `offset` added to the logit of p."""
        if offset is None:
            return self
        if self.logit is not None:
            return self._replace(logit=self.logit + offset)
        odds = self.prob * jnp.exp(offset)  # without a logit: 0 and 1 are unchanged
        return self._replace(prob=odds / (1 - self.prob + odds))

    @property
    def probability(self) -> jax.Array:
        return self.prob if self.logit is None else jax.nn.sigmoid(self.logit)


class Boundaries(NamedTuple):
    """Decisions of one stage, for losses, metrics and plots. L: positions of this stage."""

    boundary_prob_BL: jax.Array
    """p: probability of a boundary, float32; 0 on padding; 1 where a boundary is forced"""
    boundary_mask_BL: jax.Array
    """b: boundaries in use, after clipping to the stage's capacity"""
    segment_ids_BL: jax.Array
    """segment ids of this stage's positions; 0 = padding"""
    num_boundaries_B: jax.Array
    """number of boundaries per row, before clipping"""
    num_slots_G: jax.Array
    """number of slots needed per group of rows that share slots, before clipping: one per boundary
    and, with a null chunk, one per segment; nothing is clipped if the capacity is at least this"""
    boundary_ste_BL: jax.Array
    """b before clipping, float32, with the gradient of the value that was thresholded"""
    boundary_logit_BL: jax.Array | None = None
    """logit of p, from a predictor that has one"""
    route_ids_BL: jax.Array | None = None
    """route (script group) of each position, int32; None if the model has one route"""
    extra: Any = None
    """arrays that the predictor passes to the pool and the losses"""
    levels_BL: jax.Array | None = None
    """level of each position, from a rule that gives the boundaries of several stages"""
    opened_BL: jax.Array | None = None
    """positions with a slot of the main network; None: the boundaries"""
    key_bias_BL: jax.Array | None = None
    """bias on the attention score of each position's key in the main network, float32"""

    @property
    def rows_sharing_slots(self) -> int:
        return self.segment_ids_BL.shape[0] // self.num_slots_G.shape[0]

    @property
    def selected_prob_BL(self) -> jax.Array:
        """c: confidence in the decision; p at boundaries, 1 - p elsewhere."""
        return jnp.where(self.boundary_mask_BL, self.boundary_prob_BL, 1 - self.boundary_prob_BL)


def decide(
    prediction: Prediction,
    context: Context,
    capacity: int,
    *,
    has_null_chunk: bool = False,
    relaxed_prob_BL: jax.Array | None = None,
    rows_sharing_slots: int = 1,
    allowed_BL: jax.Array | None = None,
    max_chunk_len: int = 0,
) -> Boundaries:
    """Boundaries where p > 0.5 (strictly, as in the official code), clipped to the capacity.

    has_null_chunk: each segment begins with a null chunk; otherwise its first position is a
        boundary.
    relaxed_prob_BL: relaxed sample thresholded at 0.5 instead of p (training with noise).
    allowed_BL: positions that can be boundaries (the first of a segment always can); None: all.
    max_chunk_len: distance of the last boundary at which one is forced; 0 = none.
    `rows_sharing_slots` rows share `capacity` slots, which go to boundaries in row order.
    Boundaries beyond the capacity are dropped, and their positions join the previous chunk. Only
    the clipped mask is used downstream; a row without any slot gets no main-network output.
    """
    segment_ids_BL = context.segment_ids_BL
    starts_BL = segment_starts(segment_ids_BL) & (segment_ids_BL != 0)

    def bounded(a_BL):
        if allowed_BL is not None:
            a_BL = jnp.where(allowed_BL, a_BL, 0.0)
        if not has_null_chunk:
            a_BL = jnp.where(starts_BL, 1.0, a_BL)
        return jnp.where(segment_ids_BL != 0, a_BL, 0.0)

    p_BL = bounded(prediction.probability)
    thresholded_BL = p_BL if relaxed_prob_BL is None else bounded(relaxed_prob_BL)
    wanted_BL = thresholded_BL > 0.5
    if max_chunk_len:
        age_BL = since_boundary(wanted_BL, starts_BL, has_null_chunk=has_null_chunk)
        forced_BL = (age_BL > 0) & (age_BL % max_chunk_len == 0) & (segment_ids_BL != 0)
        wanted_BL |= forced_BL
        p_BL, thresholded_BL = (jnp.where(forced_BL, 1.0, a) for a in (p_BL, thresholded_BL))
    opened_BL = wanted_BL.astype(jnp.int32)
    num_boundaries_B = jnp.sum(opened_BL, axis=1, dtype=jnp.int32)
    if has_null_chunk:
        opened_BL = opened_BL + starts_BL.astype(jnp.int32)
    slots_GP = jnp.cumsum(side_by_side(opened_BL, rows_sharing_slots), axis=1, dtype=jnp.int32)
    straight_through_BL = wanted_BL.astype(jnp.float32) + (
        thresholded_BL - jax.lax.stop_gradient(thresholded_BL)
    )
    return Boundaries(
        p_BL,
        wanted_BL & (slots_GP <= capacity).reshape(wanted_BL.shape),
        segment_ids_BL,
        num_boundaries_B,
        slots_GP[:, -1],
        straight_through_BL,
        prediction.logit,
        context.route_ids_BL,
        prediction.extra,
        prediction.levels,
    )


def open_all(
    boundaries: Boundaries, key_bias_BL: jax.Array, capacity: int, rows_sharing_slots: int = 1
) -> Boundaries:
    """Every position gets a slot of the main network, up to the capacity, with a bias on its key.

    The first position of a segment is kept: its bias is 0.
    """
    segment_ids_BL = boundaries.segment_ids_BL
    valid_BL = segment_ids_BL != 0
    side = side_by_side(valid_BL.astype(jnp.int32), rows_sharing_slots)
    slots_GP = jnp.cumsum(side, axis=1, dtype=jnp.int32)
    opened_BL = valid_BL & (slots_GP <= capacity).reshape(valid_BL.shape)
    return boundaries._replace(
        boundary_mask_BL=(boundaries.boundary_ste_BL > 0.5) & opened_BL,
        num_slots_G=slots_GP[:, -1],
        opened_BL=opened_BL,
        key_bias_BL=jnp.where(segment_starts(segment_ids_BL), 0.0, key_bias_BL),
    )


def since_boundary(
    boundary_BL: jax.Array, starts_BL: jax.Array, *, has_null_chunk: bool = False
) -> jax.Array:
    """Number of positions since the last boundary of the segment, int32; 0 at boundaries.

    has_null_chunk: a chunk begins at the start of a segment, so the boundary before it lies one
    position earlier. Otherwise the start is a boundary.
    """
    index_BL = jnp.broadcast_to(
        jnp.arange(boundary_BL.shape[1], dtype=jnp.int32), boundary_BL.shape
    )
    before_BL = jnp.where(starts_BL, index_BL - int(has_null_chunk), -1)
    last_BL = jnp.maximum(before_BL, jnp.where(boundary_BL, index_BL, -1))
    return index_BL - jax.lax.cummax(last_BL, axis=1)


def side_by_side(a_BL: jax.Array, rows: int) -> jax.Array:
    """Concatenate every `rows` neighbouring rows, (B / rows, rows * L, ...)."""
    return a_BL.reshape(-1, rows * a_BL.shape[1], *a_BL.shape[2:])


def share_slots(
    h_BLD: jax.Array, boundaries: Boundaries, context: Context
) -> tuple[jax.Array, Boundaries, Context]:
    """States, decisions and context in which the rows that share slots are concatenated.

    Segments of different rows get different ids, so the inner stages see an ordinary packed row.
    Earlier rows affect a row only through the position of its slots.
    """
    rows = boundaries.rows_sharing_slots
    if rows == 1:
        return h_BLD, boundaries, context
    B, L = context.segment_ids_BL.shape
    first_B1 = (L + 1) * (jnp.arange(B, dtype=jnp.int32) % rows)[:, None]
    ids_BL = jnp.where(context.segment_ids_BL != 0, context.segment_ids_BL + first_B1, 0)

    def shared(record):
        record = record._replace(segment_ids_BL=ids_BL)
        by_position = {
            name: side_by_side(a, rows)
            for name, a in record._asdict().items()
            if name.endswith("_BL") and a is not None
        }
        if getattr(record, "extra", None) is not None:
            by_position["extra"] = jax.tree.map(lambda a: side_by_side(a, rows), record.extra)
        return record._replace(**by_position)

    return side_by_side(h_BLD, rows), shared(boundaries), shared(context)
