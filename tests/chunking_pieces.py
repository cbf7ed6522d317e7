"""Helpers to call the parts of a stage one by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.boundaries import Boundaries, Prediction, decide
from hnet.chunking.dechunks.ema import EMA
from hnet.chunking.dechunks.repeat import AtBoundaries, Repeat
from hnet.chunking.part import LossInputs, Place, Positions
from hnet.chunking.pools.extreme import Max, Min
from hnet.chunking.pools.mean import Mean
from hnet.chunking.pools.select import Select
from hnet.chunking.rates import rate_counts
from hnet.chunking.slots import Slots, open_slots
from hnet.nn.context import Context

POOLS = {"select": Select, "mean": Mean, "max": Max, "min": Min}
DECHUNKS = {"ema": EMA, "repeat": Repeat, "at_boundaries": AtBoundaries}


def made(part: type, **fields):
    """A part without parameters."""
    return part(part.Config(**fields), None, rngs=None)


def decided(
    p_BL, segment_ids_BL, capacity, *, has_null_chunk=False, relaxed=None, logit=None,
    route_ids=None, rows=1,
) -> Boundaries:  # fmt: skip
    """`decide` on probabilities."""
    context = Context(segment_ids_BL, route_ids_BL=route_ids)
    found = decide(
        Prediction(prob=p_BL), context, capacity, has_null_chunk=has_null_chunk,
        relaxed_prob_BL=relaxed, rows_sharing_slots=rows,
    )  # fmt: skip
    return found._replace(boundary_logit_BL=logit)


class Chunks(NamedTuple):
    x_BMD: jax.Array
    slots: Slots

    @property
    def segment_ids_BM(self):
        return self.slots.context.segment_ids_BL

    @property
    def route_ids_BM(self):
        return self.slots.context.route_ids_BL


def chunked(
    x_BLD, boundaries: Boundaries, capacity: int, null_chunk_D=None, pool="select"
) -> Chunks:
    context = Context(boundaries.segment_ids_BL, route_ids_BL=boundaries.route_ids_BL)
    slots = open_slots(boundaries, context, capacity, has_null_chunk=null_chunk_D is not None)
    part = made(POOLS[pool])
    x_BMD = part(Positions(x_BLD, context, part.config), boundaries, slots)
    if null_chunk_D is not None:
        x_BMD = jnp.where(slots.is_null_BM[..., None], null_chunk_D[None, None], x_BMD)
    return Chunks(x_BMD, slots)


def dechunked(y_BMD, chunks: Chunks, boundaries: Boundaries, how="ema"):
    part = made(DECHUNKS[how])
    return part(y_BMD, boundaries, chunks.slots, part.config)


def loss_of(part: type, boundaries, target_ratio_R, *, given=None, logits=None, **fields):
    """A boundary loss before weighting; alignment END with a null chunk, unless forced."""
    forced = fields.pop("forced", False)
    counts = rate_counts(boundaries, len(target_ratio_R))
    x = LossInputs(
        boundaries, part.Config(**fields), target_ratio_R, not forced, counts, counts, None, logits,
        given,
    )  # fmt: skip
    return part()(x)


def place(d_model: int, chunking=None, d_inner: int | None = None) -> Place:
    return Place(0, d_model, d_inner or d_model, chunking)


def previous(x_BLD):
    """The state one position to the left; zeros at the first."""
    return jnp.pad(x_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))
