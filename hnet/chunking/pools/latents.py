"""A pool of latents: vectors of a chunk that read its positions, in one pass or in several."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.bounds import Count
from hnet.chunking.part import Place, Pool, PoolConfig
from hnet.nn.attention import masked_attention
from hnet.nn.layers import RMSNorm, linear, segment_positions
from hnet.nn.parameters import parameter


class Reader(nnx.Module):
    """q + attention(norm(q), norm(h)) for the N vectors q of a chunk and the states h of another.

    As wide as the narrower of the two (google-research/pix2seq, architectures/transformers.py). The
    chunk read is the one before a boundary with alignment start, of at most P positions. X channels
    are keys and values of a position.
    """

    def __init__(self, num_heads: int, length: int, d_model: int, d_query: int, *, rngs: nnx.Rngs):
        """length: P. d_model, d_query: widths of states and of vectors."""
        self.num_heads, self.length = num_heads, length
        self.width = width = min(d_model, d_query)
        make = lambda d_in, d_out: linear(
            d_in, d_out, "embed_fused out", std=d_in**-0.5, dtype=jnp.float32, rngs=rngs
        )
        self.query_norm, self.norm = RMSNorm(d_query), RMSNorm(d_model)
        self.Wq, self.Wkv = make(d_query, width), make(d_model, 2 * width)
        self.out_proj = make(width, d_query)

    def keys(self, h_BLD: jax.Array) -> jax.Array:
        """Keys and values (B, L, X) of positions."""
        return self.Wkv(self.norm(h_BLD))

    def attend(self, q_RNE: jax.Array, kv_RPX: jax.Array, visible_RP: jax.Array) -> jax.Array:
        """Vectors (R, N, E) after reading the visible positions."""
        (R, N, _), H = q_RNE.shape, self.num_heads
        by_head = lambda a: a.reshape(R, -1, H, self.width // H)
        q, k, v = map(by_head, (self.Wq(self.query_norm(q_RNE)), *jnp.split(kv_RPX, 2, axis=-1)))
        visible_RNP = jnp.broadcast_to(visible_RP[:, None], (R, N, visible_RP.shape[1]))
        return q_RNE + self.out_proj(masked_attention(q, k, v, visible_RNP).reshape(R, N, -1))

    def __call__(
        self,
        q_BMNE: jax.Array,
        h_BLD: jax.Array,
        slot_BL: jax.Array,
        ids_BL: jax.Array,
        opened_at_BM: jax.Array,
        ids_BM: jax.Array,
    ) -> jax.Array:
        """Vectors (B, M, N, E) of all slots after reading the positions of the slot before each.

        slot_BL: slot of each position. opened_at_BM: first position of each slot. ids: segments.
        """
        B, M, N, E = q_BMNE.shape
        age_P = jnp.arange(1, self.length + 1, dtype=jnp.int32)[None, None]
        index_BMP = opened_at_BM[..., None] - age_P
        index_BMP = jnp.where(index_BMP < 0, h_BLD.shape[1], index_BMP)  # negative ones would wrap
        take = jax.vmap(lambda a_L, index: a_L.at[index].get(mode="fill", fill_value=0))

        @jax.checkpoint
        def read(q_BMNE, kv_BLX):
            before_M = jnp.arange(-1, M - 1, dtype=jnp.int32)[None, :, None]
            same_BMP = (take(ids_BL, index_BMP) == ids_BM[..., None]) & (ids_BM != 0)[..., None]
            visible_BMP = same_BMP & (take(slot_BL, index_BMP) == before_M)
            flat = lambda a: a.reshape(B * M, *a.shape[2:])
            read_XNE = self.attend(flat(q_BMNE), flat(take(kv_BLX, index_BMP)), flat(visible_BMP))
            return read_XNE.reshape(B, M, N, E)

        return read(q_BMNE, self.keys(h_BLD))

    def of_open_chunk(
        self, h_BLD: jax.Array, begin_B: jax.Array, lengths_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(keys and values (B, P, X), number of positions) of chunks that begin at `begin` and are
        open at the end of the rows. A ring: position i of the chunk is at i mod P."""
        count_B = lengths_B - begin_B
        newest_B1 = count_B[:, None] - 1
        index_P = jnp.arange(self.length, dtype=jnp.int32)[None]
        index_BP = newest_B1 - (newest_B1 - index_P) % self.length
        index_BP = jnp.where(index_BP < 0, h_BLD.shape[1], begin_B[:, None] + index_BP)
        take = jax.vmap(lambda a_L, index: a_L.at[index].get(mode="fill", fill_value=0))
        return self.keys(take(h_BLD, index_BP)), count_B

    def visible(self, count_R: jax.Array) -> jax.Array:
        """Which places of the ring hold positions, for chunks of these lengths, bool (R, P)."""
        return jnp.arange(self.length, dtype=jnp.int32)[None] < count_R[:, None]


class Latents(Pool):
    """k learned vectors that read the positions of the chunk before a boundary, side by side.

    FIT (arXiv 2305.12689; FITAR of google-research/pix2seq). A document's first chunk is opened
    before any position was read: its vectors are the learned ones. There its group reads zeros.
    """

    alignments = ("start",)
    reads_chunk_again = True

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """Learned vectors that read the chunk before the boundary (FIT)."""

        num_queries: Count = 4
        """k: number of vectors per chunk"""
        num_heads: Count = 4
        """number of attention heads"""
        num_chunks: Count = 1
        """number of chunks of a document, the empty one before the first included, whose vectors
        are learned separately; later chunks share those of the last of them"""

        def problem_in(self, chunking):
            if chunking.max_chunk_len:
                return None
            return (
                "max_chunk_len=0 with pool='latents', which keeps the positions of a chunk: use "
                "the length at which a boundary is forced, such as 32"
            )

        def problem_at(self, place):
            width = min(place.d_model, place.d_inner // self.num_queries)
            if width and width % self.num_heads == 0:
                return None
            return (
                f"num_heads={self.num_heads} does not divide {width}, the width of attention, the "
                f"smaller of d_model={place.d_model} and that of {self.num_queries} vectors in "
                f"{place.d_inner} channels: use a divisor"
            )

    def __init__(self, config, place, *, rngs: nnx.Rngs):
        super().__init__(config, place, rngs=rngs)
        self.reader = self.make_reader(config, place, rngs=rngs)
        size = config.num_chunks * self.d_out(config, place)
        self.latents = parameter(jax.random.normal(rngs.params(), (size,)), "channels")

    @classmethod
    def make_reader(cls, config: Config, place: Place, *, rngs: nnx.Rngs) -> Reader:
        """A reader of this pool's vectors; further passes have their own."""
        E = place.d_inner // config.num_queries
        length = place.chunking.max_chunk_len
        return Reader(config.num_heads, length, place.d_model, E, rngs=rngs)

    @classmethod
    def d_out(cls, config, place):
        return place.d_inner // config.num_queries * config.num_queries

    def queries(self, chunk_X: jax.Array) -> jax.Array:
        """Learned vectors (..., N, E) of the chunks with these indices in their documents."""
        n, N = self.config.num_chunks, self.config.num_queries
        latents_CNE = self.latents[...].reshape(n, N, -1)
        return latents_CNE[jnp.minimum(chunk_X, n - 1)]

    # The state holds keys and values of the open chunk's positions, as in `Reader.of_open_chunk`,
    # their number, and the index of the chunk that a boundary would begin.

    def init(self, rows, d_model):
        return (
            jnp.zeros((rows, self.reader.length, 2 * self.reader.width), jnp.float32),
            jnp.zeros((rows,), jnp.int32),
            jnp.zeros((rows,), jnp.int32),
        )

    def step(self, state, x):
        kv_RPX, count_R, chunk_R = state
        found = self.reader.attend(self.queries(chunk_R), kv_RPX, self.reader.visible(count_R))
        kv_RPX = put(kv_RPX, count_R, self.reader.keys(x.h_RD[:, None])[:, 0])
        return (kv_RPX, count_R + 1, chunk_R), found.reshape(len(count_R), -1)

    def restart(self, state, rows, d_model):
        kv_RPX, count_R, chunk_R = state  # the boundary is the first position of the new chunk
        take = jax.vmap(lambda kv_PX, i: kv_PX[i % len(kv_PX)])
        first_RX, zeros_R = take(kv_RPX, count_R - 1), jnp.zeros_like(count_R)
        return put(jnp.zeros_like(kv_RPX), zeros_R, first_RX), zeros_R + 1, chunk_R + 1

    def __call__(self, rows, boundaries, slots):
        ids_BM = slots.context.segment_ids_BL
        q_BMNE = self.queries(segment_positions(ids_BM))
        found = self.reader(
            q_BMNE, rows.h_BLD, slots.slot_BL, rows.context.segment_ids_BL,
            slots.opened_at_BM, ids_BM,
        )  # fmt: skip
        return found.reshape(*ids_BM.shape, -1)

    def after(self, rows, boundaries):
        mask_BL = boundaries.boundary_mask_BL
        index_L = jnp.arange(mask_BL.shape[1], dtype=jnp.int32)[None]
        begin_B = jnp.max(jnp.where(mask_BL, index_L, 0), axis=1)
        kv_BPX, count_B = self.reader.of_open_chunk(rows.h_BLD, begin_B, rows.lengths_B)
        return kv_BPX, count_B, jnp.sum(mask_BL, axis=1, dtype=jnp.int32)


def put(ring_RPX: jax.Array, index_R: jax.Array, new_RX: jax.Array) -> jax.Array:
    """Rings with a new entry at index mod P."""
    P = ring_RPX.shape[1]
    is_new_RP = jnp.arange(P, dtype=jnp.int32)[None] == (index_R % P)[:, None]
    return jnp.where(is_new_RP[..., None], new_RX[:, None], ring_RPX)
