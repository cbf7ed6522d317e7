"""The pool of MEGABYTE: the states of a chunk side by side, projected to the inner width."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.bounds import Count
from hnet.chunking.part import Pool, PoolConfig
from hnet.chunking.pools.mean import chunk_ids
from hnet.nn.cache import last_positions
from hnet.nn.layers import RMSNorm, linear, segment_starts
from hnet.nn.parameters import parameter


class LayerNorm(nnx.Module):
    """Layer norm with bias over the last axis; returns float32."""

    def __init__(self, d_model: int):
        self.rms = RMSNorm(d_model)
        self.bias = parameter(jnp.zeros((d_model,), jnp.float32), "channels", decay=False)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x_BLD = x_BLD.astype(jnp.float32)
        return (
            self.rms(x_BLD - jnp.mean(x_BLD, axis=-1, keepdims=True)) + self.bias[...][None, None]
        )


def last_of_chunk(
    h_BLD: jax.Array, ends_BM: jax.Array, chunk_ids_BL: jax.Array, length: int
) -> jax.Array:
    """The last `length` states of the chunks that end at `ends`, (B, M, length, D).

    Places before the chunk's first position hold 0, at the left.
    """
    index_P = jnp.arange(1 - length, 1, dtype=jnp.int32)
    index_BMP = ends_BM[..., None] + index_P[None, None]
    index_BMP = jnp.where(index_BMP < 0, h_BLD.shape[1], index_BMP)
    take = jax.vmap(lambda values, index: values.at[index].get(mode="fill", fill_value=0))
    last_BM = jnp.where(ends_BM < 0, h_BLD.shape[1], ends_BM)
    own_BMP = take(chunk_ids_BL, index_BMP) == take(chunk_ids_BL, last_BM)[..., None]
    return jnp.where(own_BMP[..., None], take(h_BLD, index_BMP), 0.0)


class Concat(Pool):
    """norm(W norm([h_{t-P+1} ... h_t]) + b) at the end t of a chunk (arXiv 2305.07185).

    The last P positions of the chunk; a shorter chunk has zeros at the left. Layer norms with bias,
    as in lucidrains/MEGABYTE-pytorch. With alignment start it is the chunk before the boundary, as
    there, and zeros at the first boundary of a document.
    """

    alignments = ("end", "start")

    @dataclass(frozen=True)
    class Config(PoolConfig):
        """States of the chunk's last positions side by side, projected (MEGABYTE)."""

        length: Count = 8
        """P: number of positions; normally the number of positions per chunk"""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        width, E = config.length * place.d_model, place.d_inner
        self.is_before = place.chunking.alignment == "start"
        self.norm = LayerNorm(width)
        self.proj = linear(width, E, "embed out", dtype=place.dtype, rngs=rngs)
        self.bias = parameter(jnp.zeros((E,), jnp.float32), "channels", decay=False)
        self.out_norm = LayerNorm(E)

    @classmethod
    def d_out(cls, config, place):
        return place.d_inner

    def project(self, h_BMPD: jax.Array) -> jax.Array:
        h_BMF = h_BMPD.reshape(*h_BMPD.shape[:2], -1)
        y_BME = self.proj(self.norm(h_BMF)).astype(jnp.float32) + self.bias[...][None, None]
        return self.out_norm(y_BME)

    def init(self, rows, d_model):
        return jnp.zeros((rows, self.config.length, d_model), jnp.float32)

    def step(self, last_RPD, x):
        now_RPD = jnp.concatenate([last_RPD[:, 1:], x.h_RD[:, None]], axis=1)
        chunk_RPD = last_RPD if self.is_before else now_RPD
        return now_RPD, self.project(chunk_RPD[:, None])[:, 0]

    def restart(self, state, rows, d_model):
        if not self.is_before:
            return self.init(rows, d_model)
        return jnp.zeros_like(state).at[:, -1].set(state[:, -1])

    def __call__(self, rows, boundaries, slots):
        ids_BL, ends_BM = self._chunks(rows, boundaries), slots.opened_at_BM
        if self.is_before:
            starts_BM = slots.gather(segment_starts(rows.context.segment_ids_BL))
            ends_BM = jnp.where(starts_BM, -self.config.length, ends_BM - 1)
        return self.project(last_of_chunk(rows.h_BLD, ends_BM, ids_BL, self.config.length))

    def _chunks(self, rows, boundaries):
        """Number of each position's chunk (B, L)."""
        mask_BL, ids_BL = boundaries.boundary_mask_BL, rows.context.segment_ids_BL
        if not self.is_before:
            return chunk_ids(mask_BL, ids_BL)
        opens_BL = mask_BL | segment_starts(ids_BL)
        return jnp.cumsum(opens_BL, axis=1, dtype=jnp.int32)

    def after(self, rows, boundaries):
        mask_BL, ids_BL = boundaries.boundary_mask_BL, self._chunks(rows, boundaries)
        last_BPD = last_positions(rows.h_BLD, rows.lengths_B, self.config.length)
        ids_BP = last_positions(ids_BL, rows.lengths_B, self.config.length)
        ends_BL = jnp.zeros_like(mask_BL) if self.is_before else mask_BL
        open_B = rows.at_end(ids_BL + ends_BL.astype(jnp.int32))
        return jnp.where((ids_BP == open_B[:, None])[..., None], last_BPD, 0.0)
