"""What a stage asks of its parts: boundary predictor, pool, dechunk, loss.

A part computes whole rows (`__call__`) and one position of a stream (`init` and `step`, or `write`
and `read`). The streaming form is enough: whole rows are then computed by a scan over it, which is
slow and right. A part that writes its own `__call__` is held to that scan by tests/parts.

R counts rows that have a position in a step; states are pytrees of arrays (R, ...). A document
starts with the state that `init` returns, so nothing passes from one document to the next.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Boundaries, Prediction
from hnet.chunking.rates import RateCounts
from hnet.chunking.routes import apply_routed
from hnet.chunking.slots import Slots
from hnet.chunking.table import DECHUNKS, LOSSES, POOLS, PREDICTORS
from hnet.nn.cache import last_positions
from hnet.nn.context import Context
from hnet.nn.layers import segment_positions, segment_starts
from hnet.parts import Part, Settings


class Place(NamedTuple):
    """Where in the network a part stands."""

    stage_idx: int
    d_model: int
    """width of the stage that it belongs to"""
    d_inner: int
    """width of the stage inside"""
    chunking: Any
    """how that stage chunks (`ChunkingConfig`)"""


class Positions(NamedTuple):
    """Whole rows, as a part sees them."""

    h_BLD: jax.Array
    """encoder states, float32; the encoder's inputs for a predictor that reads only bytes"""
    context: Context
    config: Any
    """settings of the part, whose traced numbers may be arrays"""

    @property
    def lengths_B(self) -> jax.Array:
        """Positions of each row up to its padding."""
        return jnp.sum(self.context.segment_ids_BL != 0, axis=1, dtype=jnp.int32)

    def at_end(self, values_BL: jax.Array) -> jax.Array:
        """Values at each row's last position, 0 for an empty row."""
        return last_positions(values_BL, self.lengths_B, 1)[:, 0]


class Position(NamedTuple):
    """One position of R rows, as a part sees it."""

    h_RD: jax.Array
    index_R: jax.Array
    """positions of the document before this one, int32"""
    context: Context
    """what travels beside the states: fields named `_BL` have the shape (R,) here"""
    config: Any


def step_through(
    init: Callable[[int], Any],
    step: Callable[[Any, Position], tuple[Any, Any]],
    rows: Positions,
    after: Callable[[Any, Any], Any] | None = None,
    beside_BL: Any = None,
) -> tuple[Any, Any]:
    """`step` at every position of whole rows: (outputs (B, L, ...), states after the rows).

    after(state, beside_R): the state that the next position finds. Each document starts with
    `init`; on padding nothing changes.
    """
    ids_BL = rows.context.segment_ids_BL
    first = init(ids_BL.shape[0])

    def one(state, x):
        h_RD, index_R, start_R, context_R, beside_R = x
        valid_R = context_R.segment_ids_BL != 0
        state = where_rows(start_R & valid_R, first, state)
        new, out = step(state, Position(h_RD, index_R, context_R, rows.config))
        if after is not None:
            new = after(new, beside_R)
        return where_rows(valid_R, new, state), out

    by_row = (
        rows.h_BLD,
        segment_positions(ids_BL),
        segment_starts(ids_BL),
        rows.context,
        beside_BL,
    )
    by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), by_row)
    state, out = jax.lax.scan(one, first, by_time)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), out), state


def where_rows(mask_R: jax.Array, new: Any, old: Any) -> Any:
    """`new` in the rows of the mask, `old` in the others, leaf by leaf."""

    def choose(a, b):
        return jnp.where(mask_R.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


class PredictorConfig(Settings):
    """Settings of a boundary predictor."""

    table = PREDICTORS


class BoundaryPredictor(Part, nnx.Module):
    """Says at each position how sure it is of a boundary there, from what it has seen so far."""

    Config = PredictorConfig
    reads_bytes: ClassVar[bool] = False
    """Whether it is a rule of bytes or is handed its boundaries: before the encoder, in stage 0"""
    reads_states: ClassVar[bool] = True
    """Whether it reads the encoder's states; otherwise it is shown the encoder's inputs"""
    is_learned: ClassVar[bool] = True
    """Whether a loss or a threshold offset can move its rate"""
    alignments: ClassVar[tuple[str, ...]] = ("start", "end")
    """What its boundaries can mean"""
    target_is_static: ClassVar[bool] = True
    """Whether the target ratio is compiled in, as a stride or in the initial parameters"""

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config, self.num_groups = config, 1

    def start_at(self, rates: tuple[float, ...]) -> None:
        """Initialise for these boundary rates, one per script group if it is stacked over them."""

    def per_group(self, context: Context, *inputs_BLD: jax.Array) -> jax.Array:
        """`self.score(*inputs)` (B, L), with the parameters of each position's script group.

        A predictor whose parameters act only through `score`, position by position, can be stacked
        over script groups.
        """
        return apply_routed(self, self.num_groups, context.route_ids_BL, *inputs_BLD)

    def per_group_step(self, x: Position, *inputs_RD: jax.Array) -> jax.Array:
        """`per_group` for one position of R rows, (R,)."""
        one_long = jax.tree.map(lambda a: a[:, None], x.context)
        return self.per_group(one_long, *(a[:, None] for a in inputs_RD))[:, 0]

    def init(self, rows: int) -> Any:
        """What a stream remembers before the first position of each of `rows` rows."""
        return ()

    def step(self, state: Any, x: Position) -> tuple[Any, Prediction]:
        """(state, prediction (R,)) of one position."""
        raise TypeError(f"{type(self).__name__} needs step(state, x)")

    def __call__(self, rows: Positions) -> Prediction:
        """The prediction (B, L) of whole rows."""
        return step_through(self.init, self.step, rows)[0]

    def after(self, rows: Positions) -> Any:
        """What a stream remembers after these rows, of one document each, padded on the right."""
        state = self.init(rows.context.segment_ids_BL.shape[0])
        if not jax.tree.leaves(state):
            return state
        return step_through(self.init, self.step, rows)[1]

    def relax(self, logit_BL: jax.Array, config: Any, key: jax.Array | None) -> jax.Array | None:
        """A relaxed sample to threshold at 0.5 instead of p; None: there is none."""
        return None

    def passes_gradient(self, config: Any) -> bool:
        """Whether b passes the gradient of what was thresholded (straight through)."""
        return True


class PoolConfig(Settings):
    """Settings of a pool."""

    table = POOLS


class Pool(Part, nnx.Module):
    """Makes the vectors of a chunk from the encoder states of its positions."""

    Config = PoolConfig
    alignments: ClassVar[tuple[str, ...]] = ("end",)
    """What boundaries can mean: a pool that reads a whole chunk runs where the chunk ends"""
    slots_per_chunk: ClassVar[int] = 1
    """k: positions of the main network per chunk"""

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config = config

    @classmethod
    def d_out(cls, config: Any, place: Place) -> int:
        """Width of a chunk's vector; a wider stage inside widens it as the official model does."""
        return place.d_model

    def init(self, rows: int, d_model: int) -> Any:
        """What a stream remembers of a chunk that has no position yet."""
        return ()

    def step(self, state: Any, x: Position) -> tuple[Any, jax.Array]:
        """(state, what the chunk would be if it ended here (R, k E)).

        After a boundary the stage goes on with `init`.
        """
        raise TypeError(f"{type(self).__name__} needs step(state, x)")

    def __call__(self, rows: Positions, boundaries: Boundaries, slots: Slots) -> jax.Array:
        """The vectors of all chunks, float32 (B, M, k E). Null and unused slots are free."""
        return slots.gather(self._step_through(rows, boundaries)[0])

    def after(self, rows: Positions, boundaries: Boundaries) -> Any:
        """What a stream remembers of the unfinished chunk at the end of these rows."""
        state = self.init(rows.h_BLD.shape[0], rows.h_BLD.shape[-1])
        if not jax.tree.leaves(state):
            return state
        return self._step_through(rows, boundaries)[1]

    def _step_through(self, rows: Positions, boundaries: Boundaries) -> tuple[jax.Array, Any]:
        def init(num_rows):
            return self.init(num_rows, rows.h_BLD.shape[-1])

        def after(state, boundary_R):
            return where_rows(boundary_R, init(boundary_R.shape[0]), state)

        return step_through(init, self.step, rows, after, boundaries.boundary_mask_BL)


class DechunkConfig(Settings):
    """Settings of a dechunk."""

    table = DECHUNKS


class Dechunk(Part, nnx.Module):
    """Gives positions what the main network said of the chunks so far."""

    Config = DechunkConfig

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config = config

    @classmethod
    def d_in(cls, config: Any, place: Place) -> int:
        """Channels of the main network's output that it reads, the first ones."""
        return place.d_model

    def init(self, rows: int, d_in: int) -> Any:
        """What a stream remembers before the first chunk; positions there read 0."""
        return jnp.zeros((rows, d_in), jnp.float32)

    def write(self, state: Any, y_RE: jax.Array, prob_R: jax.Array, config: Any) -> Any:
        """The state after the main network's output for a chunk that was opened at p = `prob`."""
        raise TypeError(f"{type(self).__name__} needs write(state, y, prob, config)")

    def read(self, state: Any, is_boundary_R: jax.Array, config: Any) -> tuple[Any, jax.Array]:
        """(state, what a position reads, float32 (R, D)), after `write` if it is a boundary."""
        return state, state

    def __call__(
        self, y_BME: jax.Array, boundaries: Boundaries, slots: Slots, config: Any
    ) -> jax.Array:
        """What every position reads, float32 (B, L, D)."""
        return self._step_through(y_BME, boundaries, slots, config)[0]

    def after(self, y_BME: jax.Array, boundaries: Boundaries, slots: Slots, config: Any) -> Any:
        """What a stream remembers after these rows."""
        return self._step_through(y_BME, boundaries, slots, config)[1]

    def _step_through(self, y_BME, boundaries, slots, config) -> tuple[jax.Array, Any]:
        ids_BL, y_BME = boundaries.segment_ids_BL, y_BME.astype(jnp.float32)
        opens_null_BL = jnp.zeros(ids_BL.shape, bool)
        if slots.is_null_BM is not None:
            opens_null_BL = segment_starts(ids_BL) & (ids_BL != 0)
        take = jax.vmap(lambda y_ME, slot: y_ME.at[slot].get(mode="fill", fill_value=0))
        first = self.init(y_BME.shape[0], y_BME.shape[-1])

        def one(state, x):
            slot_B, boundary_B, null_B, start_B, reads_B, valid_B, p_B = x
            state = where_rows(start_B & valid_B, first, state)
            before_B = slot_B - boundary_B.astype(jnp.int32)
            null = self.write(state, take(y_BME, before_B), jnp.ones_like(p_B), config)
            state = where_rows(null_B & reads_B, null, state)
            own = self.write(state, take(y_BME, slot_B), p_B, config)
            state = where_rows(boundary_B, own, state)
            new, out_BD = self.read(state, boundary_B, config)
            out_BD = jnp.where(reads_B[:, None], out_BD, 0.0)
            return where_rows(valid_B, new, state), out_BD

        xs = (
            slots.slot_BL, boundaries.boundary_mask_BL, opens_null_BL, segment_starts(ids_BL),
            slots.is_read_BL(ids_BL), ids_BL != 0, boundaries.boundary_prob_BL,
        )  # fmt: skip
        state, out_LBD = jax.lax.scan(one, first, jax.tree.map(lambda a: a.T, xs))
        return jnp.moveaxis(out_LBD, 0, 1), state


class LossConfig(Settings):
    """Settings of a loss; every one has a field `weight`, which is traced."""

    table = LOSSES
    traced = ("weight",)

    def problem(self):
        return None if self.weight >= 0 else f"weight={self.weight}: use 0 or more"


class LossInputs(NamedTuple):
    """What a loss of a stage may look at."""

    boundaries: Boundaries
    config: Any
    """settings of the loss, whose traced numbers may be arrays"""
    target_ratio_R: jax.Array
    """N: positions per chunk that are wanted of each script group (one, if none are told apart)"""
    has_null: bool
    """whether a segment begins with a null chunk; otherwise its first boundary is forced"""
    own: RateCounts
    """counts of these rows by route"""
    whole: RateCounts
    """counts of the batch that these rows are part of: losses of the parts add up to the batch's"""
    next_byte_nll_BL: jax.Array | None = None
    """-ln p(byte t | bytes < t) in nats, of the bytes of a row; 0 at t = 0"""
    logits_BLV: jax.Array | None = None
    labels_BL: jax.Array | None = None
    """boundaries to learn, bool; None if the batch brings none"""
    state: Any = ()
    """what the loss remembers from update to update"""

    def mean(self, values_BL: jax.Array) -> jax.Array:
        """What these rows contribute to the mean over all valid positions of the batch."""
        valid_BL = self.boundaries.segment_ids_BL != 0
        total = jnp.sum(self.whole.positions_R)
        return jnp.sum(jnp.where(valid_BL, values_BL, 0.0)) / jnp.maximum(total, 1.0)


class Loss(Part):
    """A number to minimise beside cross-entropy, before its weight."""

    Config = LossConfig
    is_by_row: ClassVar[bool] = False
    """Whether it is a mean over rows of their own rates, so that rows may not share slots"""
    trains_labels: ClassVar[bool] = False
    """Whether it teaches the predictor boundaries of bytes, which then set its rate"""

    def init(self) -> Any:
        """What it remembers before the first update: arrays that are no parameters."""
        return ()

    def __call__(self, x: LossInputs) -> jax.Array:
        """What these rows contribute to the loss of the batch, float32."""
        raise TypeError(f"{type(self).__name__} needs __call__(x)")

    def next_state(
        self, state: Any, counts: RateCounts, target_ratio_R: jax.Array, config: Any
    ) -> Any:
        """What it remembers after an update from a batch with these counts."""
        return state
