"""The decoder of a stage with several passes between positions and chunk vectors.

FIT (arXiv 2305.12689): local layers over positions and global layers over the vectors of chunks
take turns, with cross-attention from one to the other. The first pass is that of every stage:
encoder, pool, main network, decoder with layers that read chunk vectors. In each further pass the
vectors first read the states of their chunk again, then pass another main network, and another
decoder reads them. Vectors are those of the chunk before a boundary, so all passes for a position
need only earlier positions, and a stream runs them at the position itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.part import Place
from hnet.chunking.slots import position_of_slot
from hnet.config import HNetConfig
from hnet.layout import layout_height
from hnet.nn.cache import Rows, last_positions, read, write
from hnet.nn.context import ChunkMemory, Context, Memory, StepContext
from hnet.nn.isotropic import Isotropic
from hnet.nn.parameters import set_stage


class PassCache(NamedTuple):
    """State of all passes; arrays have a leading axis, then the rows, as in layer caches."""

    decoders: list
    """caches of each pass"""
    main_networks: list
    """caches of each further pass, as the following fields"""
    keys: list
    """keys and values of the open chunk's positions (1, B, P, X), a ring"""
    memories: list
    """chunk vectors (1, B, C, N, E), at the places of `ChunkMemory`"""
    slot: jax.Array
    """slot that the last position read, (1, B); -1 before any"""
    count: jax.Array
    """number of positions that read this slot, (1, B)"""


class Passes(nnx.Module):
    """(B, L, D) -> (B, L, D), as a decoder whose layers read `Context.memory`."""

    def __init__(
        self, config: HNetConfig, stage_idx: int, *, num_residuals: int, rngs: nnx.Rngs
    ):  # fmt: skip
        stage, inner = config.stages[stage_idx : stage_idx + 2]
        chunking, more = stage.chunking, range(stage.passes - 1)
        place = Place(stage_idx, stage.d_model, inner.d_model, chunking, config.compute.dtype)
        inner_residuals = num_residuals + stage.passes * layout_height(inner.arch_layout[0])
        stack = lambda stage, layout, residuals: Isotropic(
            config, stage, layout, num_residuals=residuals, rngs=rngs
        )
        make_reader = chunking.pool.part.make_reader
        self.decoders = nnx.List(
            [stack(stage, stage.arch_layout[1], num_residuals) for _ in range(stage.passes)]
        )
        self.readers = nnx.List([make_reader(chunking.pool, place, rngs=rngs) for _ in more])
        self.main_networks = nnx.List(
            [stack(inner, inner.arch_layout[0], inner_residuals) for _ in more]
        )
        set_stage(self.main_networks, stage_idx + 1)

    @property
    def further(self) -> Any:
        return zip(self.readers, self.main_networks, self.decoders[1:])

    # --- whole rows -----------------------------------------------------------------------------

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        x_BLD = self.decoders[0](x_BLD, context)
        for reader, main_network, decoder in self.further:
            vectors_GMX, inner = self._read(reader, x_BLD, context.memory)
            x_GMND = main_network(vectors_GMX, inner).reshape(context.memory.x_GMND.shape)
            context = context._replace(memory=context.memory._replace(x_GMND=x_GMND))
            x_BLD = decoder(x_BLD, context)
        return x_BLD

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int,
        *, max_slots: int, window: int,
    ) -> tuple[jax.Array, PassCache]:  # fmt: skip
        """`Stack.prefill`. max_slots: maximum number of slots of a row. window: number of slots
        whose vectors are kept for the decoder."""
        memory = context.memory
        x_BLD, decoder = self.decoders[0].prefill(x_BLD, context, lengths_B, max_len)
        caches, main_networks, keys, memories = [decoder], [], [], []
        slots_B = jnp.sum(memory.segment_ids_GM != 0, axis=1, dtype=jnp.int32)
        last_B1 = last_positions(memory.query_group_BL, lengths_B, 1)
        is_open_BL = memory.query_group_BL == last_B1
        is_open_BL &= jnp.arange(x_BLD.shape[1], dtype=jnp.int32)[None] < lengths_B[:, None]
        count_B = jnp.sum(is_open_BL, axis=1, dtype=jnp.int32)
        for reader, main_network, decoder in self.further:
            vectors_BMX, inner = self._read(reader, x_BLD, memory)
            keys.append(reader.of_open_chunk(x_BLD, lengths_B - count_B, lengths_B)[0][None])
            y_BMX, cache = main_network.prefill(vectors_BMX, inner, slots_B, max_slots)
            main_networks.append(cache)
            memory = memory._replace(x_GMND=y_BMX.reshape(memory.x_GMND.shape))
            memories.append(ChunkMemory.after(memory.x_GMND, slots_B, window).x_BCND[None])
            context = context._replace(memory=memory)
            x_BLD, cache = decoder.prefill(x_BLD, context, lengths_B, max_len)
            caches.append(cache)
        slot_B = jnp.where(lengths_B > 0, last_B1[:, 0], -1)
        return x_BLD, PassCache(caches, main_networks, keys, memories, slot_B[None], count_B[None])

    def _read(self, reader: nnx.Module, x_BLD: jax.Array, memory: Memory) -> tuple:
        """(vectors of all slots after reading the states of their chunk, context of the slots)."""
        ids_GM, (G, M, *_) = memory.segment_ids_GM, memory.x_GMND.shape
        by_memory = lambda a: a.reshape(G, -1, *a.shape[2:])
        slot_GL, ids_GL = map(by_memory, (memory.query_group_BL, memory.query_segment_ids_BL))
        before_GL = jnp.pad(slot_GL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        opens_GL = (slot_GL != before_GL) & (slot_GL >= 0)
        opened_at_GM = position_of_slot(opens_GL, slot_GL, M)
        found = reader(memory.x_GMND, by_memory(x_BLD), slot_GL, ids_GL, opened_at_GM, ids_GM)
        return found.reshape(G, M, -1), Context(ids_GM)

    # --- one position ---------------------------------------------------------------------------

    def step(
        self, x_RD: jax.Array, cache: PassCache, rows: Rows, context: StepContext
    ) -> tuple[jax.Array, PassCache]:
        """`Stack.step`: at a position that reads a new slot, first the further passes of it."""
        memory, at = context.memory, (0, rows)
        slot_R, B = memory.query_group_BL[:, 0], cache.slot.shape[1]
        is_new_R = slot_R != read(cache.slot, at)
        count_R = jnp.where(is_new_R, 0, read(cache.count, at))
        opening = Rows(jnp.where(is_new_R, rows.index_R, B), rows.are_all)
        rounds = jnp.any(is_new_R & (rows.index_R < B)).astype(jnp.int32)
        x_RD, decoder = self.decoders[0].step(x_RD, cache.decoders[0], rows, context)
        decoders, main_networks, keys, memories = [decoder], [], [], []
        states = zip(cache.main_networks, cache.keys, cache.memories, cache.decoders[1:])
        for (reader, main_network, decoder), state in zip(self.further, states):
            inner, kv, vectors, own = state
            visible_RP = reader.visible(read(cache.count, at))

            def open_slot(_, carry, reader=reader, main_network=main_network, kv=kv,
                          visible_RP=visible_RP, x_RCND=memory.x_GMND):  # fmt: skip
                inner, vectors = carry
                place_R = slot_R % x_RCND.shape[1]
                q_RND = jax.vmap(lambda x_CND, i: x_CND[i])(x_RCND, place_R)
                q_RND = reader.attend(q_RND, read(kv, at), visible_RP)
                now = StepContext(slot_R)
                y_RX, inner = main_network.step(q_RND.reshape(len(q_RND), -1), inner, opening, now)
                vectors = write(vectors, (0, opening, place_R), y_RX.reshape(q_RND.shape))
                return inner, vectors

            inner, vectors = jax.lax.fori_loop(0, rounds, open_slot, (inner, vectors))
            new_RX = reader.keys(x_RD[:, None])[:, 0]
            kv = write(kv, (0, rows, count_R % reader.length), new_RX)
            memory = memory._replace(x_GMND=read(vectors, at))
            x_RD, own = decoder.step(x_RD, own, rows, context._replace(memory=memory))
            for states, new in ((main_networks, inner), (keys, kv), (memories, vectors)):
                states.append(new)
            decoders.append(own)
        slot, count = write(cache.slot, at, slot_R), write(cache.count, at, count_R + 1)
        return x_RD, PassCache(decoders, main_networks, keys, memories, slot, count)
