"""The recursion over stages: encoder -> boundaries -> pool -> main network -> dechunk -> decoder.

A stage computes whole rows (`HNet.__call__`), computes prompts and returns a cache
(`HNet.prefill`), and computes one position of the rows that have one (`HNet.step`). Methods of
papers are implemented in parts (`hnet.chunking.part`); this file only calls parts.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking import characters
from hnet.chunking.boundaries import Boundaries, decide, open_all, share_slots
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunks.prefix import insert_prefixes, place_prefixes, read_places
from hnet.chunking.part import BoundaryPredictor, Place, Position, Positions, where_rows
from hnet.chunking.routes import stack_routes
from hnet.chunking.slots import Slots, open_slots
from hnet.config import HNetConfig
from hnet.layout import is_class, layout_height
from hnet.nn.active_rows import run_on_active_rows
from hnet.nn.cache import last_positions
from hnet.nn.context import ChunkMemory, Context, Memory, StepContext, apart, together
from hnet.nn.isotropic import Isotropic
from hnet.nn.layers import segment_positions
from hnet.nn.mixers import reads_memory
from hnet.nn.parameters import metadata, parameter, set_stage
from hnet.nn.stack import find_stack
from hnet.passes import Passes

Numbers = tuple[dict[str, Any], ...]
"""Traced numbers of the parts, one dict per stage, from a stage inwards: for each part
("predictor", "pool", "dechunk") the fields of its settings that a compiled program takes as
inputs."""


class Pace(NamedTuple):
    """When the main networks of a step run, and on how many rows at once."""

    fractions: tuple[float, ...]
    """batch sizes on which they run, as shares of B; static"""
    wait_share: float | jax.Array
    """share of the rows not yet in the main network that must wait at a boundary before it runs"""
    num_rows: jax.Array
    """number of rows that take part in the step"""


class Waiting(NamedTuple):
    """State of rows between the encoder and the decoder of a stage."""

    fresh_B: jax.Array
    """whether the row has a chunk that was not yet passed to the main network"""
    inside_B: jax.Array
    """whether the row has a chunk that waits inside the main network"""
    chunk_BE: jax.Array
    prob_B: jax.Array
    residual_BD: jax.Array
    level_B: jax.Array | None = None
    """level of the position, from a predictor that gives levels"""


class StageCache(NamedTuple):
    """Streaming state of a stage for B rows."""

    position_B: jax.Array
    """number of positions so far in this stage"""
    max_len: jax.Array
    """maximum number of positions of this stage; the stage around it drops boundaries beyond it"""
    stacks: dict[str, list]
    """layer caches of the encoder and decoder, or of the innermost main network"""
    predictor: Any = ()
    pool: Any = ()
    dechunk: Any = ()
    """states of the parts"""
    first_B: dict[str, jax.Array] | None = None
    """first position that a stack with scope "chunk" sees, per name of the stack"""
    decoder_B: jax.Array | None = None
    """number of positions so far of a decoder with prefixes; None without"""
    missing_B: jax.Array | None = None
    """number of bytes that the last character still lacks; None if boundaries may divide it"""
    boundary_B: jax.Array | None = None
    """last position with a boundary, -1 before any; None if the length of chunks has no limit"""
    memory: ChunkMemory | None = None
    """chunk vectors that the decoder's layers read; None if it has no such layers"""
    waiting: Waiting | None = None
    inner: "StageCache | None" = None


class Prompts(NamedTuple):
    """Whole rows that a stream continues: a stack then also returns its cache."""

    lengths_B: jax.Array
    max_lens: tuple[int, ...]
    """maximum number of positions of a stage and of those inside it; static"""


class Opened(NamedTuple):
    """Whole rows in a stage that has its boundaries and whose main network did not run yet."""

    h_BLD: jax.Array
    """output of the encoder"""
    residual_BLD: jax.Array
    own: Boundaries
    context: Context
    encoder: Any = ()
    """cache of the encoder, for prompts"""


class Exchange(NamedTuple):
    """Values exchanged between a stage and its main network in a step."""

    inner: StageCache
    dechunk: Any
    inside_B: jax.Array
    """rows with a chunk that waits inside the main network"""
    answered_B: jax.Array
    """rows with an output of the main network in this step"""
    memory: ChunkMemory | None = None
    boundaries: tuple[list, ...] = ()
    """decisions of the inner stages in each call"""


class HNet(nnx.Module):
    """Stage `stage_idx` and all stages inside it: (B, L, D) -> (B, L, width of this stage).

    D is the width of a chunk vector from the stage around it; a wider stage pads its input with a
    learned vector. The main network is another HNet or, in the innermost stage, a plain stack.
    """

    def __init__(
        self,
        config: HNetConfig,
        stage_idx: int = 0,
        *,
        d_input: int | None = None,
        outer: int = 0,
        rngs: nnx.Rngs,
    ):
        """d_input: width of the input; None: width of this stage. outer: number of residual
        additions in the encoders and decoders of all stages around this one."""
        stage = config.stages[stage_idx]
        D, chunking = stage.d_model, stage.chunking
        num_residuals = outer + sum(layout_height(part) for part in stage.arch_layout)
        inner_residuals = 0  # those of further passes, in the main networks there
        if (further := stage.passes - 1) > 0:
            num_residuals += further * layout_height(stage.arch_layout[1])
            inner_residuals = further * layout_height(config.stages[stage_idx + 1].arch_layout[0])

        def stack(layout):
            make = find_stack(layout) if is_class(layout) else Isotropic
            return make(config, stage, layout, num_residuals=num_residuals, rngs=rngs)

        self.stage_idx, self.chunking = stage_idx, chunking
        self.is_innermost = stage_idx == config.num_chunked
        padding = D - (D if d_input is None else d_input)
        zeros = jnp.zeros((padding,), jnp.float32)
        self.pad_dimension = parameter(zeros, "channels") if padding else None
        if self.is_innermost:
            self.main_network = stack(stage.arch_layout[0])
            set_stage(self, stage_idx)
            return
        d_inner, dtype = config.stages[stage_idx + 1].d_model, config.compute.dtype
        place = Place(stage_idx, D, d_inner, chunking, dtype)
        self.encoder = stack(stage.arch_layout[0])
        self.decoder = (
            Passes(config, stage_idx, num_residuals=num_residuals, rngs=rngs)
            if stage.passes > 1
            else stack(stage.arch_layout[1])
        )
        self.routing_module = make_predictor(chunking, place, rngs=rngs)
        # one offset per route, added to the logit of p; set by the controller, not by a gradient
        offsets = jnp.zeros((chunking.routes,), jnp.float32)
        self.boundary_offset = (
            parameter(offsets, "script", decay=False) if chunking.hold_rate else None
        )
        # Zeros, so that the encoder first learns through the main network. The official code keeps
        # torch's random default for the bias, probably an oversight; nothing else differs.
        self.residual_proj = nnx.Linear(
            D, D, kernel_init=nnx.initializers.zeros,
            precision=jax.lax.Precision.HIGHEST, rngs=rngs,
            kernel_metadata=metadata("embed out"), bias_metadata=metadata("out", decay=False),
        ) if chunking.residual == "linear" else None  # fmt: skip
        d_chunk = chunking.pool.part.d_out(chunking.pool, place)
        self.d_chunk = chunking.slots_per_chunk * d_chunk
        self.null_group = (
            parameter(jax.random.normal(rngs.params(), (self.d_chunk,), jnp.float32), "channels")
            if chunking.has_null_chunk
            else None
        )
        self.main_network = HNet(
            config, stage_idx + 1, d_input=d_chunk, outer=num_residuals + inner_residuals,
            rngs=rngs,
        )  # fmt: skip
        self.chunk_layer = chunking.pool.part(chunking.pool, place, rngs=rngs)
        self.dechunk_layer = chunking.dechunk.part(chunking.dechunk, place, rngs=rngs)
        self.num_prefixes = 0  # positions of the decoder before each chunk
        if chunking.dechunk.part.stands_in_decoder:
            self.num_prefixes = chunking.dechunk.part.memory_width(chunking.dechunk, place) // D
        self.instead = chunking.alignment == "end"  # of the boundary's own input
        self.d_read = chunking.dechunk.part.d_in(chunking.dechunk, place)
        self.cross_attention = stage.cross_attention
        self.memory_width = None
        if reads_memory(stage.arch_layout[1], config.mixers):
            self.memory_width = stage.cross_attention.memory_width or D
        set_stage(self, stage_idx)  # does not change the main network, which has its stage already

    # --- shared by all three forms --------------------------------------------------------------

    def widen(self, x_BLD: jax.Array) -> jax.Array:
        if self.pad_dimension is None:
            return x_BLD
        pad_BLP = jnp.broadcast_to(
            self.pad_dimension[...], (*x_BLD.shape[:2], *self.pad_dimension.shape)
        )
        return jnp.concatenate([x_BLD, pad_BLP], axis=-1)

    def residual(self, h_BLD: jax.Array) -> jax.Array:
        """Skip connection around the main network, float32."""
        match self.chunking.residual:
            case "linear":
                return self.residual_proj(h_BLD)
            case "add":
                return h_BLD
            case "none":
                return jnp.zeros_like(h_BLD)
            case other:
                raise ValueError(f"residual={other!r} is unknown")

    def offset(self, route_ids: jax.Array | None) -> jax.Array | None:
        """Threshold offset on the logit of p: a scalar, or one per position with several routes."""
        if self.boundary_offset is None:
            return None
        offset_R = jax.lax.stop_gradient(self.boundary_offset[...])
        return offset_R[0] if self.chunking.routes == 1 else offset_R[route_ids]

    def with_null(self, chunks: jax.Array, is_null: jax.Array | None) -> jax.Array:
        """Vectors of chunks (B, M, k E), with the learned vector in null chunks."""
        if is_null is None:
            return chunks
        return jnp.where(is_null[..., None], self.null_group[...][None, None], chunks)

    def chunk_vectors(self, y_BME: jax.Array) -> jax.Array | None:
        """Vectors (B, M, N, D) that the decoder's cross-attention layers read; None without them.

        y_BME: main network's output for chunks, k d_in channels each.
        """
        if self.memory_width is None:
            return None
        memory_BMX = self.dechunk_layer.memory(y_BME.astype(jnp.float32))
        return memory_BMX.reshape(*y_BME.shape[:2], -1, self.memory_width)

    def memory(
        self, y_BME: jax.Array, shared: Boundaries, slots: Slots, length: int
    ) -> Memory | None:
        """Memory of the decoder for whole rows of `length` positions.

        shared: boundaries; rows that share slots are one row of them.
        """
        if (x_GMND := self.chunk_vectors(y_BME)) is None:
            return None
        by_row = lambda a: a.reshape(-1, length)
        return Memory(
            x_GMND, by_row(slots.slot_BL), segment_ids_GM=slots.context.segment_ids_BL,
            query_segment_ids_BL=by_row(shared.segment_ids_BL),
        )  # fmt: skip

    def _settings(self, part: str, numbers: Numbers | None) -> Any:
        """Settings of a part, with arrays as the values of the traced fields."""
        settings = getattr(self.chunking, part)
        return settings.with_numbers(numbers[0][part]) if numbers else settings

    # --- whole rows -----------------------------------------------------------------------------

    def boundaries(
        self,
        h_BLD: jax.Array,
        context: Context,
        capacity: int,
        *,
        key: jax.Array | None = None,
        numbers: Numbers | None = None,
        rows_sharing_slots: int = 1,
    ) -> Boundaries:
        """Boundaries of this stage; arguments as in `__call__` and `HNetLM`."""
        config = self._settings("predictor", numbers)
        prediction = self.routing_module(Positions(h_BLD, context, config))
        prediction = prediction.shifted(self.offset(context.route_ids_BL))
        if key is not None:
            key = jax.random.fold_in(key, self.stage_idx)
        found = decide(
            prediction, context, capacity, has_null_chunk=self.chunking.has_null_chunk,
            relaxed_prob_BL=self.routing_module.relax(prediction.logit, config, key),
            rows_sharing_slots=rows_sharing_slots, allowed_BL=self._allowed(context),
            max_chunk_len=self.chunking.max_chunk_len,
        )  # fmt: skip
        bias_BL = self.routing_module.key_bias(prediction, config, training=key is not None)
        if bias_BL is not None:
            found = open_all(found, bias_BL, capacity, rows_sharing_slots)
        if self.routing_module.passes_gradient(config):
            return found
        return found._replace(boundary_ste_BL=jax.lax.stop_gradient(found.boundary_ste_BL))

    def _allowed(self, context: Context) -> jax.Array | None:
        """Positions that can be boundaries; None: all."""
        if not self.chunking.at_characters:
            return None
        if self.chunking.alignment == "start":
            return ~characters.is_continuation(context.bytes_BL)
        return characters.missing(context.bytes_BL, context.segment_ids_BL) == 0

    def chunk(
        self,
        h_BLD: jax.Array,
        context: Context,
        boundaries: Boundaries,
        capacity: int,
        numbers: Numbers | None = None,
    ) -> tuple[jax.Array, Context, Slots]:
        """(inputs of the main network, their context, slots)."""
        if boundaries.levels_BL is not None:
            context = context._replace(levels_BL=boundaries.levels_BL)
        slots = open_slots(
            boundaries, context, capacity, has_null_chunk=self.chunking.has_null_chunk
        )
        rows = Positions(h_BLD, context, self._settings("pool", numbers))
        x_BME = self.with_null(self.chunk_layer(rows, boundaries, slots), slots.is_null_BM)
        positions_BM = None  # the indices of chunks
        if self.chunking.inner_positions == "original":
            positions_BL = context.positions_BL
            if positions_BL is None:
                positions_BL = segment_positions(context.segment_ids_BL)
            positions_BM = slots.gather(positions_BL)
        inner = slots.context._replace(positions_BL=positions_BM)
        return *apart(x_BME, inner, self.chunking.slots_per_chunk), slots

    def __call__(
        self,
        x_BLD: jax.Array,
        context: Context,
        capacities: tuple[int | None, ...],
        *,
        rows_sharing_slots: int = 1,
        key: jax.Array | None = None,
        numbers: Numbers | None = None,
    ) -> tuple[jax.Array, list[Boundaries]]:
        """(output in float32, boundaries of each stage, this one first).

        capacities[i]: slots of the i-th stage from here for each `rows_sharing_slots` rows; None:
        enough slots for every position to be a boundary, so nothing is clipped. The inner stages
        see rows that share slots as one row.
        """
        x_BLD = self.widen(x_BLD)
        if self.is_innermost:
            with jax.named_scope("main_network"):
                return self.main_network(x_BLD, context), []

        most = rows_sharing_slots * self.chunking.max_slots(x_BLD.shape[1])
        capacity = min(capacities[0] or most, most)
        opened = self.open(
            x_BLD, context, capacity,
            key=key, numbers=numbers, rows_sharing_slots=rows_sharing_slots,
        )  # fmt: skip
        with jax.named_scope("chunk"):  # once: the gradients of both uses are added here
            shared = share_slots(opened.h_BLD, opened.own, opened.context)
        x_BME, inner_context, slots = self.enter(opened, capacity, numbers, shared)
        with jax.named_scope(f"stage{self.stage_idx + 1}"):
            y_BME, inner = self.main_network(
                x_BME, inner_context, capacities[1:], key=key, numbers=numbers and numbers[1:]
            )
        x_BLD, _ = self.leave(y_BME, opened, slots, numbers=numbers, shared=shared)
        return x_BLD, [opened.own, *inner]

    def open(
        self,
        x_BLD: jax.Array,
        context: Context,
        capacity: int | None = None,
        *,
        prompts: Prompts | None = None,
        **cut: Any,
    ) -> Opened:
        """Everything before the pool. capacity: slots of a row; None: nothing is clipped.

        x_BLD: rows of this stage's width (`widen`). cut: keyword arguments of `boundaries`.
        """
        capacity = capacity or self.chunking.max_slots(x_BLD.shape[1])
        own, encoder_context = None, context
        if self.chunking.encoder_scope == "chunk":
            with jax.named_scope("routing_module"):
                own = self.boundaries(x_BLD, context, capacity, **cut)
                encoder_context = context._replace(segment_ids_BL=self._encoder_chunks(own))
        with jax.named_scope("encoder"):
            h_BLD, encoder = self._rows("encoder", x_BLD, encoder_context, prompts)
        with jax.named_scope("residual_proj"):
            residual_BLD = self.residual(h_BLD)
        if own is None:
            with jax.named_scope("routing_module"):
                own = self.boundaries(h_BLD, context, capacity, **cut)
        return Opened(h_BLD, residual_BLD, own, context, encoder)

    def enter(
        self, opened: Opened, capacity: int, numbers: Numbers | None = None, shared: Any = None
    ) -> tuple[jax.Array, Context, Slots]:
        """`chunk` for a stage that was opened: with any capacity that holds its boundaries, as the
        boundaries in use were clipped when it was opened. shared: result of `share_slots`."""
        with jax.named_scope("chunk"):
            shared = shared or share_slots(opened.h_BLD, opened.own, opened.context)
            h_BLD, boundaries, context = shared
            return self.chunk(h_BLD, context, boundaries, capacity, numbers)

    def leave(
        self,
        y_BME: jax.Array,
        opened: Opened,
        slots: Slots,
        *,
        prompts: Prompts | None = None,
        numbers: Numbers | None = None,
        shared: Any = None,
    ) -> tuple[jax.Array, Any]:
        """(output, cache of the decoder for prompts), from the main network's output."""
        context, rows = opened.context, self._outputs(y_BME)
        _, shared, _ = shared or share_slots(opened.h_BLD, opened.own, context)
        with jax.named_scope("dechunk"):
            config = self._settings("dechunk", numbers)
            x_BLD = self.dechunk_layer(rows, shared, slots, config)
            x_BLD = x_BLD.reshape(opened.residual_BLD.shape) + opened.residual_BLD
        if self.chunking.decoder_scope == "chunk":
            context = context._replace(segment_ids_BL=_decoder_chunks(context, slots))
        context = context._replace(memory=self.memory(rows, shared, slots, x_BLD.shape[1]))
        with jax.named_scope("decoder"):
            if self.num_prefixes:
                return self._decode_with_prefixes(x_BLD, rows, opened.own, slots, context, prompts)
            return self._rows("decoder", x_BLD, context, prompts)

    def _decode_with_prefixes(
        self, x_BLD: jax.Array, y_BME: jax.Array, own: Boundaries, slots: Slots, context: Context,
        prompts: Prompts | None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """`_rows` of the decoder, with the vectors of each chunk before it."""
        vectors_BMX = self.dechunk_layer.memory(y_BME.astype(jnp.float32))
        vectors_BLX = slots.scatter(vectors_BMX).reshape(*x_BLD.shape[:2], -1)
        x_BXD, ids_BX, place_BL = insert_prefixes(
            x_BLD, context.segment_ids_BL, vectors_BLX, own.boundary_mask_BL,
            instead=self.instead, most=y_BME.shape[1],
        )  # fmt: skip
        if prompts is not None:
            longest, limit = prompts.max_lens[0], self.chunking.max_chunk_len
            room = self.num_prefixes + 1 + (min(longest, limit) if limit else longest)
            prompts = Prompts(self._decoder_lengths(own, prompts.lengths_B), (room,))
        y_BXD, cache = self._rows("decoder", x_BXD, Context(ids_BX), prompts)
        return read_places(y_BXD, place_BL), cache

    def _decoder_lengths(self, own: Boundaries, lengths_B: jax.Array) -> jax.Array:
        """Number of positions of a decoder with prefixes, for rows of these lengths."""
        place_BL = place_prefixes(own.boundary_mask_BL, self.num_prefixes - self.instead)
        last_B = last_positions(place_BL, lengths_B, 1)[:, 0]
        return jnp.where(lengths_B > 0, last_B + 1, 0)

    def _rows(
        self, name: str, x_BLD: jax.Array, context: Context, prompts: Prompts | None
    ) -> tuple[jax.Array, Any]:
        """(output of a stack, its cache for prompts)."""
        if prompts is None:
            return getattr(self, name)(x_BLD, context), ()
        if name == "decoder" and isinstance(self.decoder, Passes):
            max_len, max_slots = prompts.max_lens[:2]
            return self.decoder.prefill(
                x_BLD, context, prompts.lengths_B, max_len,
                max_slots=max_slots, window=self._memory_size(max_slots),
            )  # fmt: skip
        return getattr(self, name).prefill(x_BLD, context, prompts.lengths_B, prompts.max_lens[0])

    def _outputs(self, y_BME: jax.Array) -> jax.Array:
        """The channels that this stage reads of the main network's output, one row per chunk."""
        return together(y_BME[..., : self.d_read], self.chunking.slots_per_chunk)

    def _encoder_chunks(self, boundaries: Boundaries) -> jax.Array:
        """Segment ids (B, L), one per chunk that positions belong to; 0 on padding."""
        opens_BL = boundaries.boundary_mask_BL
        if self.chunking.alignment == "end":  # a boundary belongs to the chunk that it ends
            opens_BL = jnp.pad(opens_BL[:, :-1], ((0, 0), (1, 0)))
        ids_BL = boundaries.segment_ids_BL
        chunk_BL = jnp.cumsum(opens_BL, axis=1, dtype=jnp.int32) + 1
        return jnp.where(ids_BL != 0, ids_BL * (ids_BL.shape[1] + 2) + chunk_BL, 0)

    # --- prompts --------------------------------------------------------------------------------

    def prefill(
        self, x_BLD: jax.Array, context: Context, prompts: Prompts
    ) -> tuple[jax.Array, list[Boundaries], StageCache]:
        """`__call__` on rows of one segment each, and the cache after them."""
        x_BLD = self.widen(x_BLD)
        if self.is_innermost:
            return *self.prefill_innermost(x_BLD, context, prompts), []
        capacity = most_slots(self.chunking, x_BLD.shape[1], prompts.max_lens)
        opened = self.open(x_BLD, context, capacity, prompts=prompts)
        x_BME, inner_context, slots = self.enter(opened, capacity)
        y_BME, inner, found = self.main_network.prefill(
            x_BME, inner_context, inner_prompts(inner_context, prompts)
        )
        x_BLD, cache = self.leave_prompts(y_BME, opened, slots, prompts, inner)
        return x_BLD, cache, [opened.own, *found]

    def prefill_innermost(
        self, x_BLD: jax.Array, context: Context, prompts: Prompts
    ) -> tuple[jax.Array, StageCache]:
        """`prefill` of a stage without boundaries, on rows of its width."""
        y_BLD, stack = self._rows("main_network", x_BLD, context, prompts)
        max_len = jnp.int32(prompts.max_lens[0])
        return y_BLD, StageCache(prompts.lengths_B, max_len, {"main_network": stack})

    def leave_prompts(
        self, y_BME: jax.Array, opened: Opened, slots: Slots, prompts: Prompts, inner: StageCache
    ) -> tuple[jax.Array, StageCache]:
        """`leave` for prompts: (output, cache of this stage). inner: cache of the main network."""
        chunking, (h_BLD, _, own, context, encoder) = self.chunking, opened
        lengths_B, max_lens = prompts
        out_BLD, decoder = self.leave(y_BME, opened, slots, prompts=prompts)

        def last(a_BL):
            return last_positions(a_BL, lengths_B, 1)[:, 0]

        y_BME, first_B = self._outputs(y_BME), {}
        if chunking.encoder_scope == "chunk":
            first_B["encoder"] = self._next_encoder_chunk(own, lengths_B)
        if chunking.decoder_scope == "chunk":
            ids_BL = _decoder_chunks(context, slots)
            same_BL = (ids_BL == last(ids_BL)[:, None]) & (ids_BL != 0)
            first_B["decoder"] = lengths_B - jnp.sum(same_BL, axis=1, dtype=jnp.int32)
        decoder_B = None
        if self.num_prefixes:
            decoder_B, more = (
                self._decoder_lengths(own, lengths_B),
                self.num_prefixes - self.instead,
            )
            size_BL = jnp.where(same_BL, 1 + more * own.boundary_mask_BL.astype(jnp.int32), 0)
            first_B["decoder"] = decoder_B - jnp.sum(size_BL, axis=1, dtype=jnp.int32)
        k = chunking.slots_per_chunk
        rows = Positions(h_BLD, context, chunking.predictor)
        none_B, zeros_BE = (
            jnp.zeros(lengths_B.shape, bool),
            jnp.zeros((len(lengths_B), self.d_chunk)),
        )
        cache = StageCache(
            lengths_B, jnp.int32(max_lens[0]), {"encoder": encoder, "decoder": decoder},
            predictor=self.routing_module.after(rows),
            pool=self.chunk_layer.after(rows._replace(config=chunking.pool), own),
            dechunk=self.dechunk_layer.after(y_BME, own, slots, chunking.dechunk),
            first_B=first_B or None,
            decoder_B=decoder_B,
            missing_B=self._missing_after(context, lengths_B),
            boundary_B=self._last_boundary(own) if chunking.max_chunk_len else None,
            memory=self._memory_after(y_BME, inner.position_B // k, max_lens[1] // k),
            waiting=Waiting(
                none_B, none_B, zeros_BE, jnp.zeros(lengths_B.shape), jnp.zeros_like(last(h_BLD)),
                None if own.levels_BL is None else jnp.zeros_like(lengths_B),
            ),
            inner=inner,
        )  # fmt: skip
        return out_BLD, cache

    def _next_encoder_chunk(self, boundaries: Boundaries, lengths_B: jax.Array) -> jax.Array:
        """First position of the chunk that the next position of a stream continues."""
        index_L = jnp.arange(boundaries.boundary_mask_BL.shape[1], dtype=jnp.int32)[None]
        begins_L = index_L + int(self.chunking.alignment == "end")
        return jnp.max(jnp.where(boundaries.boundary_mask_BL, begins_L, 0), axis=1)

    def _memory_after(self, y_BME: jax.Array, count_B: jax.Array, most: int) -> ChunkMemory | None:
        """Memory of a stream after these chunks; most: maximum number of chunks of a row."""
        if (x_BMND := self.chunk_vectors(y_BME)) is None:
            return None
        return ChunkMemory.after(x_BMND, count_B, self._memory_size(most))

    def _memory_size(self, most: int) -> int:
        """Number of chunks whose vectors a stream keeps, of at most `most` chunks."""
        window, older = self.cross_attention.window, self.cross_attention.relation == "last_closed"
        return most if window < 0 else min(window + older, most)

    def _missing_after(self, context: Context, lengths_B: jax.Array) -> jax.Array | None:
        """Number of bytes that the last character of each row still lacks."""
        if not self.chunking.at_characters:
            return None
        missing_BL = characters.missing(context.bytes_BL, context.segment_ids_BL)
        return last_positions(missing_BL, lengths_B, 1)[:, 0]

    def _last_boundary(self, boundaries: Boundaries) -> jax.Array:
        """Last position with a boundary, before clipping; -1 if there is none."""
        wanted_BL = boundaries.boundary_ste_BL > 0.5
        index_L = jnp.arange(wanted_BL.shape[1], dtype=jnp.int32)[None]
        return jnp.max(jnp.where(wanted_BL, index_L, -1), axis=1)

    # --- one position ---------------------------------------------------------------------------

    def step(
        self,
        x_BD: jax.Array,
        active_B: jax.Array,
        cache: StageCache,
        pace: Pace,
        context: Context,
        *,
        is_outermost: bool = False,
    ) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]], StageCache]:
        """Start one position of the active rows, and finish a position of the rows in `done_B`.

        context: fields of shape (B,). Rows at a boundary wait until enough of them can run the main
        network as one batch. Returns (output, done_B, (mask, p) of each stage, cache).
        """
        sizes = None if is_outermost else pace.fractions
        x_BD = self.widen(x_BD[:, None])[:, 0]
        if self.is_innermost:
            y_BD, cache = self._run("main_network", x_BD, active_B, cache, sizes, context)
            return y_BD, active_B, [], cache

        wanted_B, cache = self._encode(x_BD, active_B, cache, sizes, context)
        if (level_B := cache.waiting.level_B) is not None:
            context = context._replace(levels_BL=level_B)
        cache, answered_B, inner = self._ask(active_B, wanted_B, cache, pace, context)
        waiting = cache.waiting
        done_B = (active_B | answered_B) & ~(waiting.fresh_B | waiting.inside_B)
        state, read_BD = self.dechunk_layer.read(cache.dechunk, answered_B, self.chunking.dechunk)
        cache = cache._replace(dechunk=where_rows(done_B, state, cache.dechunk))
        if self.chunking.decoder_scope == "chunk":
            now_B = cache.decoder_B if self.num_prefixes else cache.position_B
            first_B = jnp.where(answered_B, now_B, cache.first_B["decoder"])
            cache = cache._replace(first_B=cache.first_B | {"decoder": first_B})
        has_read_B1 = (done_B & (cache.inner.position_B > 0))[:, None]
        x_BD = jnp.where(has_read_B1, read_BD, 0.0) + waiting.residual_BD
        run = self._run_with_prefixes if self.num_prefixes else partial(self._run, "decoder")
        out_BD, cache = run(x_BD, done_B, cache, sizes, context)
        own = (answered_B, jnp.where(done_B, waiting.prob_B, jnp.nan))
        return out_BD, done_B, [own, *inner], cache

    def _run(
        self,
        name: str,
        x_BD: jax.Array,
        on_B: jax.Array,
        cache: StageCache,
        sizes,
        context: Context,
    ) -> tuple[jax.Array, StageCache]:
        """Run the last stack of a position (decoder or innermost main network) on some rows."""

        def stack_step(inputs_R, caches, rows):
            x_RD, positions_R, first_R, rotary_R, memory = inputs_R
            now = StepContext(positions_R, first_R, rotary_R, memory=memory)
            return getattr(self, name).step(x_RD, caches, rows, now)

        memory = None if cache.memory is None else cache.memory.now
        first_B = (cache.first_B or {}).get(name)
        counter = "position_B" if cache.decoder_B is None else "decoder_B"
        now_B = getattr(cache, counter)
        inputs = (x_BD, now_B, first_B, context.positions_BL, memory)
        y_BD, stack = run_on_active_rows(stack_step, on_B, inputs, cache.stacks[name], sizes)
        cache = cache._replace(**{counter: now_B + on_B.astype(jnp.int32)})
        return y_BD, cache._replace(stacks=cache.stacks | {name: stack})

    def _run_with_prefixes(
        self, x_BD: jax.Array, done_B: jax.Array, cache: StageCache, sizes, context: Context
    ) -> tuple[jax.Array, StageCache]:
        """`_run` of the decoder on rows with prefixes: before them, those of rows that begin."""
        context = context._replace(positions_BL=None)
        begins_B = done_B & (cache.first_B["decoder"] == cache.decoder_B)
        own_B = done_B & ~begins_B if self.instead else done_B
        out_BD = jnp.zeros_like(x_BD)
        for vector_BD in jnp.split(cache.dechunk, self.num_prefixes, axis=-1):
            y_BD, cache = self._run("decoder", vector_BD, begins_B, cache, sizes, context)
            out_BD = where_rows(begins_B, y_BD, out_BD)
        y_BD, cache = self._run("decoder", x_BD, own_B, cache, sizes, context)
        position_B = cache.position_B + done_B.astype(jnp.int32)
        return where_rows(own_B, y_BD, out_BD), cache._replace(position_B=position_B)

    def _encode(
        self, x_BD: jax.Array, active_B: jax.Array, cache: StageCache, sizes, context: Context
    ) -> tuple[jax.Array, StageCache]:
        """Encoder, predictor and pool on the active rows: (whether a boundary is wanted, cache)."""

        chunking = self.chunking

        def encode(inputs_R, caches, rows):
            x_RD, index_R, first_R, last_R, missing_R, context_R, predictor, pool = inputs_R
            if missing_R is not None:
                missing_R = characters.missing_after(missing_R, context_R.bytes_BL)
            before = last_R, missing_R
            x = Position(x_RD, index_R, context_R, chunking.predictor)
            if scoped := chunking.encoder_scope == "chunk":
                predictor, p_R, wanted_R, level_R, extra = self._predict(predictor, x, *before)
                opens_R = wanted_R & (chunking.alignment == "start")
                first_R = jnp.where(opens_R, index_R, first_R)
            now = StepContext(index_R, first_R, context_R.positions_BL)
            h_RD, caches = self.encoder.step(x_RD, caches, rows, now)
            x = x._replace(h_RD=h_RD)
            if not scoped:
                predictor, p_R, wanted_R, level_R, extra = self._predict(predictor, x, *before)
            elif chunking.alignment == "end":
                first_R = jnp.where(wanted_R, index_R + 1, first_R)
            x = x._replace(config=chunking.pool, prob_R=p_R, extra=extra)
            pool, chunk_RE = self.chunk_layer.step(pool, x)
            residual_RD = self.residual(h_RD[:, None])[:, 0]
            waiting = (chunk_RE, p_R, residual_RD, level_R)
            return (waiting, wanted_R, first_R, missing_R, predictor, pool), caches

        first_B = (cache.first_B or {}).get("encoder")
        inputs = (
            x_BD, cache.position_B, first_B, cache.boundary_B, cache.missing_B,
            context, cache.predictor, cache.pool,
        )  # fmt: skip
        found, stack = run_on_active_rows(encode, active_B, inputs, cache.stacks["encoder"], sizes)
        waiting, wanted_B, first_B, missing_B, predictor, pool = found
        old = (tuple(cache.waiting[2:]), cache.predictor, cache.pool)
        waiting, predictor, pool = where_rows(active_B, (waiting, predictor, pool), old)
        if first_B is not None:
            first_B = jnp.where(active_B, first_B, cache.first_B["encoder"])
            cache = cache._replace(first_B=cache.first_B | {"encoder": first_B})
        if missing_B is not None:
            missing_B = jnp.where(active_B, missing_B, cache.missing_B)
            cache = cache._replace(missing_B=missing_B)
        if cache.boundary_B is not None:
            last_B = jnp.where(active_B & wanted_B, cache.position_B, cache.boundary_B)
            cache = cache._replace(boundary_B=last_B)
        return wanted_B, cache._replace(
            stacks=cache.stacks | {"encoder": stack},
            waiting=Waiting(*cache.waiting[:2], *waiting),
            predictor=predictor,
            pool=pool,
        )

    def _predict(
        self, state: Any, x: Position, last_R: jax.Array | None, missing_R: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array, Any, Any]:
        """(state, p, whether a boundary is wanted, level, arrays for the pool), as in `boundaries`,
        of one position."""
        state, prediction = self.routing_module.step(state, x)
        prediction = prediction.shifted(self.offset(x.context.route_ids_BL))
        relaxed_R = self.routing_module.relax(prediction.logit, x.config, None)
        p_R = prediction.probability
        wanted_R = (p_R if relaxed_R is None else relaxed_R) > 0.5
        if missing_R is not None:
            allowed_R = missing_R == 0
            if self.chunking.alignment == "start":
                allowed_R = ~characters.is_continuation(x.context.bytes_BL)
            p_R, wanted_R = jnp.where(allowed_R, p_R, 0.0), wanted_R & allowed_R
        forced_R = jnp.zeros_like(wanted_R)
        if not self.chunking.has_null_chunk:
            forced_R = x.index_R == 0
        if last_R is not None:
            forced_R |= ~wanted_R & (x.index_R - last_R == self.chunking.max_chunk_len)
        wanted_R, p_R = wanted_R | forced_R, jnp.where(forced_R, 1.0, p_R)
        return state, p_R, wanted_R, prediction.levels, prediction.extra

    def _ask(
        self, active_B: jax.Array, wanted_B: jax.Array, cache: StageCache, pace: Pace,
        context: Context,
    ) -> tuple[StageCache, jax.Array, list[tuple[jax.Array, jax.Array]]]:  # fmt: skip
        """Run the main network on the rows at a boundary once enough of them wait.

        Returns (cache, rows with an output of the main network, (mask, p) of each inner stage).
        """
        waiting, none_B = cache.waiting, jnp.zeros_like(active_B)
        positions_B = None
        if self.chunking.inner_positions == "original":
            positions_B = context.positions_BL
            positions_B = cache.position_B if positions_B is None else positions_B
        context = context._replace(positions_BL=positions_B)
        exchange = Exchange(cache.inner, cache.dechunk, waiting.inside_B, none_B, cache.memory)

        def has_room(inner):
            return inner.position_B + self.chunking.slots_per_chunk <= inner.max_len

        if self.chunking.has_null_chunk:  # the first position of a row first opens the null chunk
            null_BE = jnp.broadcast_to(self.null_group[...][None], waiting.chunk_BE.shape)
            first_B = active_B & (cache.position_B == 0) & has_room(exchange.inner)
            p_B = jnp.where(first_B, 1.0, waiting.prob_B)
            apart = pace._replace(fractions=(), wait_share=0.0)
            exchange = self._call(exchange, null_BE, p_B, first_B, apart, context, own=False)
            # The result of this position includes the inner stages' decisions at the null chunk,
            # so the position must not wait.
            wait_share = jnp.where(jnp.any(first_B), 0.0, pace.wait_share)
            pace = pace._replace(wait_share=wait_share)
        opens_B = active_B & wanted_B & has_room(exchange.inner)
        fresh_B = waiting.fresh_B | opens_B
        to_come = pace.num_rows - jnp.sum(exchange.inside_B, dtype=jnp.int32)
        needed = pace.wait_share * to_come.astype(jnp.float32)
        asks_B = fresh_B & (jnp.sum(fresh_B, dtype=jnp.float32) >= needed)
        exchange = self._call(exchange, waiting.chunk_BE, waiting.prob_B, asks_B, pace, context)
        begun = self.chunk_layer.restart(cache.pool, len(active_B), waiting.residual_BD.shape[-1])
        cache = cache._replace(
            inner=exchange.inner,
            dechunk=exchange.dechunk,
            memory=exchange.memory,
            pool=where_rows(opens_B, begun, cache.pool),
            waiting=waiting._replace(fresh_B=fresh_B & ~asks_B, inside_B=exchange.inside_B),
        )
        return cache, exchange.answered_B, [*map(_latest, zip(*exchange.boundaries))]

    def _call(
        self, exchange: Exchange, chunk_BE: jax.Array, prob_B: jax.Array, asks_B: jax.Array,
        pace: Pace, context: Context, own: bool = True,
    ) -> Exchange:  # fmt: skip
        """Run the main network on chunks of some rows; own: False for null chunks."""
        inner, outputs = exchange.inner, []
        for x_BE in jnp.split(chunk_BE, self.chunking.slots_per_chunk, axis=-1):
            y_BE, found_B, boundaries, inner = self.main_network.step(
                x_BE, asks_B, inner, pace, context
            )
            outputs.append(y_BE[..., : self.d_read])
        y_BE = jnp.concatenate(outputs, axis=-1)
        written = self.dechunk_layer.write(exchange.dechunk, y_BE, prob_B, self.chunking.dechunk)
        inside_B, memory = exchange.inside_B, exchange.memory
        if memory is not None:
            memory = memory.append(self.chunk_vectors(y_BE[:, None])[:, 0], found_B)
        return Exchange(
            inner,
            where_rows(found_B, written, exchange.dechunk),
            (inside_B | asks_B) & ~found_B,
            exchange.answered_B | found_B & (inside_B | (asks_B & own)),
            memory,
            (*exchange.boundaries, boundaries),
        )


def make_predictor(chunking: ChunkingConfig, place: Place, *, rngs: nnx.Rngs) -> BoundaryPredictor:
    """The boundary predictor of a stage; with several routes its parameters are stacked."""
    settings = chunking.predictor
    groups = chunking.num_predictors if settings.part.is_learned else 1
    make = lambda rngs: settings.part(settings, place, rngs=rngs)
    predictor = stack_routes(make, groups, rngs)
    predictor.num_groups = groups
    predictor.start_at(tuple(1 / N for N in chunking.target_ratios[:groups]))
    return predictor


def most_slots(chunking: ChunkingConfig, length: int, max_lens: tuple[int, ...] = ()) -> int:
    """Number of slots that a row of `length` positions can need; max_lens: those of prompts."""
    if not max_lens:
        return chunking.max_slots(length)
    return min(max_lens[1] // chunking.slots_per_chunk, length + chunking.has_null_chunk)


def inner_prompts(inner_context: Context, prompts: Prompts) -> Prompts:
    """Prompts of the main network: the slots in use are its rows."""
    num_slots_B = jnp.sum(inner_context.segment_ids_BL != 0, axis=1, dtype=jnp.int32)
    return Prompts(num_slots_B, prompts.max_lens[1:])


def _decoder_chunks(context: Context, slots: Slots) -> jax.Array:
    """Segment ids (B, L), one per chunk that positions read; 0 on padding."""
    ids_BL = context.segment_ids_BL
    slot_BL = slots.slot_BL.reshape(ids_BL.shape)
    return jnp.where(ids_BL != 0, slot_BL + 2 + ids_BL, 0)


def _latest(calls: tuple) -> tuple[jax.Array, jax.Array]:
    """(mask, p) of one stage for a byte, which can have two positions there: null chunk first."""
    (mask_B, p_B), *later = calls
    for later_mask_B, later_p_B in later:
        mask_B = mask_B | later_mask_B
        p_B = jnp.where(jnp.isnan(later_p_B), p_B, later_p_B)
    return mask_B, p_B
