"""Interfaces of a stage's parts: boundary predictor, pool, dechunk, loss.

A part computes whole rows (`__call__`) and one position of a stream (`init` and `step`, or `write`
and `read`). Only the streaming form is required: the default `__call__` scans over it, which is
correct but slow. tests/parts compares a part's own `__call__` with that scan.

R: rows with a position in a step. States are pytrees of arrays (R, ...). Each document starts with
the state that `init` returns, so documents are independent.
"""

import math
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
    """Location of a part in the network."""

    stage_idx: int
    d_model: int
    """width of the stage that the part belongs to"""
    d_inner: int
    """width of the next inner stage"""
    chunking: Any
    """`ChunkingConfig` of the stage that the part belongs to"""
    dtype: Any = "float32"
    """dtype of large matmuls; small ones that decide something use float32"""


class Positions(NamedTuple):
    """Inputs of a part for whole rows."""

    h_BLD: jax.Array
    """encoder states, float32; the encoder's inputs for a predictor with `reads_states` False"""
    context: Context
    config: Any
    """settings of the part; traced numbers may be arrays"""

    @property
    def lengths_B(self) -> jax.Array:
        """Number of valid positions per row."""
        return jnp.sum(self.context.segment_ids_BL != 0, axis=1, dtype=jnp.int32)

    def at_end(self, values_BL: jax.Array) -> jax.Array:
        """Values at each row's last position, 0 for an empty row."""
        return last_positions(values_BL, self.lengths_B, 1)[:, 0]


class Position(NamedTuple):
    """Inputs of a part for one position of R rows."""

    h_RD: jax.Array
    index_R: jax.Array
    """index of the position within its document, int32"""
    context: Context
    """context of the position; fields named `_BL` have the shape (R,) here"""
    config: Any
    prob_R: jax.Array | None = None
    """p of the position (of `Boundaries`), for a pool"""
    extra: Any = None
    """`extra` of its prediction, for a pool"""


def step_through(
    init: Callable[[int], Any],
    step: Callable[[Any, Position], tuple[Any, Any]],
    rows: Positions,
    after: Callable[[Any, Any], Any] | None = None,
    beside_BL: Any = None,
    given: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Scan `step` over whole rows: (outputs (B, L, ...), states after the rows).

    given: fields of `Position` for each position, (B, L, ...).
    after(state, beside_R): maps the state after a position to the state of the next one. Each
    document starts with `init`; padding leaves the state unchanged.
    """
    ids_BL = rows.context.segment_ids_BL
    first = init(ids_BL.shape[0])

    def one(state, x):
        h_RD, index_R, start_R, context_R, beside_R, given_R = x
        valid_R = context_R.segment_ids_BL != 0
        state = where_rows(start_R & valid_R, first, state)
        new, out = step(state, Position(h_RD, index_R, context_R, rows.config, **given_R))
        if after is not None:
            new = after(new, beside_R)
        return where_rows(valid_R, new, state), out

    by_row = (
        rows.h_BLD,
        segment_positions(ids_BL),
        segment_starts(ids_BL),
        rows.context,
        beside_BL,
        given or {},
    )
    by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), by_row)
    state, out = jax.lax.scan(one, first, by_time)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), out), state


def where_rows(mask_R: jax.Array, new: Any, old: Any) -> Any:
    """For each leaf, `new` in the rows of the mask and `old` in the others."""

    def choose(a, b):
        return jnp.where(mask_R.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


class PredictorConfig(Settings):
    """Settings of a boundary predictor."""

    table = PREDICTORS


class BoundaryPredictor(Part, nnx.Module):
    """Predicts the probability of a boundary at each position from positions up to it."""

    Config = PredictorConfig
    reads_bytes: ClassVar[bool] = False
    """Whether it reads bytes or gets its boundaries as input; possible in stage 0 only"""
    reads_states: ClassVar[bool] = True
    """Whether it reads the encoder's states; False: it gets the encoder's inputs"""
    gives_levels: ClassVar[bool] = False
    """Whether its predictions have levels, for the boundaries of inner stages"""
    reads_levels: ClassVar[bool] = False
    """Whether it needs the levels of a predictor in stage 0; not possible in stage 0"""
    is_learned: ClassVar[bool] = True
    """Whether a loss can change its rate"""
    takes_offset: ClassVar[bool] = True
    """Whether an offset of the threshold can change its rate"""
    alignments: ClassVar[tuple[str, ...]] = ("start", "end")
    """Alignments that its boundaries support"""
    gives_extra: ClassVar[str] = ""
    """What `extra` of its predictions holds: "weights" (`pools.integrate.Weights`), "gates" or
    "rewards". Pools and losses that read it accept any predictor that gives it"""
    target_is_static: ClassVar[bool] = True
    """Whether the compiled program depends on the target ratio, as a stride or in the initial
    parameters"""
    most_at_first: ClassVar[float] = math.inf
    """Multiple of the target rate that the rate of a row hardly exceeds in a run's first updates,
    before boundaries are counted; inf: any rate"""

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config, self.num_groups = config, 1

    def start_at(self, rates: tuple[float, ...]) -> None:
        """Initialise for these boundary rates; one per script group if parameters are stacked."""

    def per_group(self, context: Context, *inputs_BLD: jax.Array) -> jax.Array:
        """`self.score(*inputs)` (B, L), with the parameters of each position's script group.

        A predictor that uses its parameters only in `score`, separately for each position, can be
        stacked over script groups.
        """
        return apply_routed(self, self.num_groups, context.route_ids_BL, *inputs_BLD)

    def per_group_step(self, x: Position, *inputs_RD: jax.Array) -> jax.Array:
        """`per_group` for one position of R rows, (R,)."""
        one_long = jax.tree.map(lambda a: a[:, None], x.context)
        return self.per_group(one_long, *(a[:, None] for a in inputs_RD))[:, 0]

    def init(self, rows: int) -> Any:
        """Initial state of a stream of `rows` rows."""
        return ()

    def step(self, state: Any, x: Position) -> tuple[Any, Prediction]:
        """(state, prediction (R,)) of one position."""
        raise TypeError(f"{type(self).__name__} needs step(state, x)")

    def __call__(self, rows: Positions) -> Prediction:
        """The prediction (B, L) of whole rows."""
        return step_through(self.init, self.step, rows)[0]

    def after(self, rows: Positions) -> Any:
        """State of a stream after these rows: one document per row, padded on the right."""
        state = self.init(rows.context.segment_ids_BL.shape[0])
        if not jax.tree.leaves(state):
            return state
        return step_through(self.init, self.step, rows)[1]

    def relax(self, logit_BL: jax.Array, config: Any, key: jax.Array | None) -> jax.Array | None:
        """Relaxed sample to threshold at 0.5 instead of p; None: threshold p."""
        return None

    def key_bias(self, prediction: Prediction, config: Any, training: bool) -> jax.Array | None:
        """Bias (B, L) on the attention scores of each position's key in the main network.

        Every position then gets a slot of the main network, and boundaries only say which of them
        positions read. None: only boundaries get slots.
        """
        return None

    @classmethod
    def biases_keys(cls, config: Any) -> bool:
        """Whether `key_bias` is not always None: inner layers must then read it."""
        return cls.key_bias is not BoundaryPredictor.key_bias

    def passes_gradient(self, config: Any) -> bool:
        """Whether b passes a gradient to the thresholded value (straight-through estimator)."""
        return True


class PoolConfig(Settings):
    """Settings of a pool."""

    table = POOLS


class Pool(Part, nnx.Module):
    """Computes the vectors of a chunk from the encoder states of its positions."""

    Config = PoolConfig
    alignments: ClassVar[tuple[str, ...]] = ("end",)
    """Alignments that it supports: a pool over a whole chunk needs boundaries at chunk ends, or
    gives with alignment start the vectors of the chunk before"""
    slots_per_chunk: ClassVar[int] = 1
    """k: positions of the main network per chunk"""
    reads_chunk_again: ClassVar[bool] = False
    """Whether vectors of a chunk can read its positions again after the main network, in further
    passes; it then has `make_reader(config, place, rngs)`, as `pools.latents.Latents`"""

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config = config

    @classmethod
    def d_out(cls, config: Any, place: Place) -> int:
        """Width of a chunk's vector; a wider inner stage pads it as the official model does."""
        return place.d_model

    @classmethod
    def num_slots(cls, config: Any) -> int:
        """k for these settings."""
        return cls.slots_per_chunk

    def init(self, rows: int, d_model: int) -> Any:
        """State of a stream for a chunk without positions."""
        return ()

    def step(self, state: Any, x: Position) -> tuple[Any, jax.Array]:
        """(state, vectors of the chunk if there is a boundary here (R, k E)).

        After a boundary the stage replaces the state by `restart`.
        """
        raise TypeError(f"{type(self).__name__} needs step(state, x)")

    def restart(self, state: Any, rows: int, d_model: int) -> Any:
        """State after a boundary, from the state after its position."""
        return self.init(rows, d_model)

    def __call__(self, rows: Positions, boundaries: Boundaries, slots: Slots) -> jax.Array:
        """Vectors of all chunks, float32 (B, M, k E). Null and unused slots may hold any value."""
        return slots.gather(self._step_through(rows, boundaries)[0])

    def after(self, rows: Positions, boundaries: Boundaries) -> Any:
        """State of a stream for the unfinished chunk at the end of these rows."""
        state = self.init(rows.h_BLD.shape[0], rows.h_BLD.shape[-1])
        if not jax.tree.leaves(state):
            return state
        return self._step_through(rows, boundaries)[1]

    def _step_through(self, rows: Positions, boundaries: Boundaries) -> tuple[jax.Array, Any]:
        d_model = rows.h_BLD.shape[-1]

        def after(state, boundary_R):
            begun = self.restart(state, boundary_R.shape[0], d_model)
            return where_rows(boundary_R, begun, state)

        init = lambda num_rows: self.init(num_rows, d_model)
        given = {"prob_R": boundaries.boundary_prob_BL, "extra": boundaries.extra}
        return step_through(init, self.step, rows, after, boundaries.boundary_mask_BL, given)


class DechunkConfig(Settings):
    """Settings of a dechunk."""

    table = DECHUNKS


class Dechunk(Part, nnx.Module):
    """Computes each position's input from the main network's output for the chunks so far."""

    Config = DechunkConfig
    needs_memory: ClassVar[bool] = False
    """Whether positions read chunks only through `memory`, so that the decoder needs layers for
    it"""
    stands_in_decoder: ClassVar[bool] = False
    """Whether the vectors of `memory`, d_model wide, are positions of the decoder before each
    chunk; a stream's state is then these vectors"""
    reads_all_vectors: ClassVar[bool] = False
    """Whether it supports pools with k > 1 vectors per chunk"""

    def __init__(self, config: Any, place: Place, *, rngs: nnx.Rngs):
        self.config = config

    @classmethod
    def d_in(cls, config: Any, place: Place) -> int:
        """Number of leading channels of the main network's output that it reads."""
        return place.d_model

    @classmethod
    def memory_width(cls, config: Any, place: Place) -> int:
        """Number of channels of `memory` per chunk."""
        return place.chunking.slots_per_chunk * cls.d_in(config, place)

    def memory(self, y_BMD: jax.Array) -> jax.Array:
        """Vectors of each chunk that cross-attention layers of the decoder read, concatenated.

        y_BMD: main network's output, its `d_in` channels for each of the k slots of a chunk.
        """
        return y_BMD

    def init(self, rows: int, d_in: int) -> Any:
        """State of a stream before the first chunk; positions there read 0."""
        return jnp.zeros((rows, d_in), jnp.float32)

    def write(self, state: Any, y_RE: jax.Array, prob_R: jax.Array, config: Any) -> Any:
        """State after the main network's output for a chunk with boundary probability `prob_R`."""
        raise TypeError(f"{type(self).__name__} needs write(state, y, prob, config)")

    def read(self, state: Any, is_boundary_R: jax.Array, config: Any) -> tuple[Any, jax.Array]:
        """(state, output for a position, float32 (R, D)); at a boundary it runs after `write`."""
        return state, state

    def __call__(
        self, y_BME: jax.Array, boundaries: Boundaries, slots: Slots, config: Any
    ) -> jax.Array:
        """Output for every position, float32 (B, L, D)."""
        return self._step_through(y_BME, boundaries, slots, config)[0]

    def after(self, y_BME: jax.Array, boundaries: Boundaries, slots: Slots, config: Any) -> Any:
        """State of a stream after these rows."""
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
    """Settings of a loss. Every loss has a traced field `weight`."""

    table = LOSSES
    traced = ("weight",)

    def problem(self):
        return None if self.weight >= 0 else f"weight={self.weight}: use 0 or more"


class LossInputs(NamedTuple):
    """Inputs of a stage's loss."""

    boundaries: Boundaries
    config: Any
    """settings of the loss; traced numbers may be arrays"""
    target_ratio_R: jax.Array
    """N: target number of positions per chunk, per script group"""
    has_null_chunk: bool
    """whether a segment begins with a null chunk; False: a boundary is forced at its start"""
    own: RateCounts
    """counts of these rows, per route"""
    whole: RateCounts
    """counts of the whole batch, per route: the losses of its parts add up to the batch's loss"""
    next_byte_nll_BL: jax.Array | None = None
    """-ln p(byte t | bytes < t) in nats for the bytes of a row; 0 at t = 0"""
    logits_BLV: jax.Array | None = None
    labels_BL: jax.Array | None = None
    """boundary labels, bool; None if the batch has none"""
    state: Any = ()
    """state that the loss carries from update to update"""

    def mean(self, values_BL: jax.Array) -> jax.Array:
        """Contribution of these rows to the mean over all valid positions of the batch."""
        valid_BL = self.boundaries.segment_ids_BL != 0
        total = jnp.sum(self.whole.positions_R)
        return jnp.sum(jnp.where(valid_BL, values_BL, 0.0)) / jnp.maximum(total, 1.0)


class Loss(Part):
    """A loss in addition to cross-entropy, before it is multiplied by its weight."""

    Config = LossConfig
    is_by_row: ClassVar[bool] = False
    """Whether it averages over the rates of single rows, so that rows may not share slots"""
    trains_labels: ClassVar[bool] = False
    """Whether it trains the predictor on boundary labels for bytes, which then set its rate"""
    reads_next_byte: ClassVar[bool] = False
    """Whether it reads the cross-entropy of bytes; possible in stage 0 only"""

    def init(self) -> Any:
        """State before the first update: arrays that are not parameters."""
        return ()

    def __call__(self, x: LossInputs) -> jax.Array:
        """Contribution of these rows to the loss of the batch, float32."""
        raise TypeError(f"{type(self).__name__} needs __call__(x)")

    def next_state(
        self, state: Any, counts: RateCounts, target_ratio_R: jax.Array, config: Any
    ) -> Any:
        """State after an update on a batch with these counts."""
        return state
