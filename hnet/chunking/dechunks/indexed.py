"""Dechunk by linear maps that depend on the distance from the chunk's boundary (AU-Net)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.bounds import Count
from hnet.chunking.boundaries import Boundaries
from hnet.chunking.part import Dechunk, DechunkConfig
from hnet.nn.cache import last_positions
from hnet.nn.layers import INIT_STD, RMSNorm, linear, matmul, segment_positions
from hnet.nn.parameters import parameter


def distances(boundaries: Boundaries) -> jax.Array:
    """Number of positions since the boundary whose chunk a position reads, int32 (B, L).

    A null chunk counts as ended one position before its document.
    """
    index_BL = jnp.arange(boundaries.boundary_mask_BL.shape[1], dtype=jnp.int32)[None]
    opened_BL = jnp.where(boundaries.boundary_mask_BL, index_BL, -1)
    before_BL = index_BL - segment_positions(boundaries.segment_ids_BL) - 1
    return index_BL - jnp.maximum(jax.lax.cummax(opened_BL, axis=1), before_BL)


class Indexed(Dechunk):
    """Position t reads (A + W[d mod P]) norm(y_{slot(t)}) + b[d mod P], d: its distance from the
    boundary. A (shared) and b (bias) are optional; a chunk of k vectors has them side by side in y.

    Multi-linear upsampling of arXiv 2506.14761 (facebookresearch/lingua). A chunk's vector is
    mapped by all P matrices at once, and positions select: exact work for chunks of P positions.
    """

    reads_all_vectors = True

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """A linear map for each distance from the boundary (AU-Net, MEGABYTE)."""

        period: Count = 16
        """P: number of linear maps; distances are taken modulo P"""
        shared: bool = True
        """a further linear map, which is the same for all distances"""
        bias: bool = False
        """a bias for each distance"""
        at_boundaries: bool = False
        """output at boundaries only, with the map of distance 0; 0 elsewhere"""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        D, P = place.d_model, 1 if config.at_boundaries else config.period
        E = place.d_inner * place.chunking.slots_per_chunk  # vectors of a chunk side by side
        self.norm = RMSNorm(E)
        self.proj = (
            linear(E, D, "embed out", dtype=place.dtype, rngs=rngs) if config.shared else None
        )
        maps_PED = INIT_STD * jax.random.normal(rngs.params(), (P, E, D), jnp.float32)
        self.maps, self.dtype = parameter(maps_PED, "taps embed out"), jnp.dtype(place.dtype)
        zeros_PD = jnp.zeros((P, D), jnp.float32)
        self.bias = parameter(zeros_PD, "taps channels", decay=False) if config.bias else None

    @classmethod
    def d_in(cls, config, place):
        return place.d_inner

    def outputs(self, y_BME: jax.Array) -> jax.Array:
        """What the positions of a chunk read, by distance: float32 (B, M, P, D)."""
        y_BME, (P, E, D) = self.norm(y_BME), self.maps.shape
        weight = self.maps[...].astype(self.dtype).transpose(1, 0, 2).reshape(E, P * D)
        out_BMPD = matmul(y_BME.astype(self.dtype), weight).reshape(*y_BME.shape[:2], P, D)
        out_BMPD = out_BMPD.astype(jnp.float32)
        if self.bias is not None:
            out_BMPD = out_BMPD + self.bias[...][None, None]
        if self.proj is not None:
            out_BMPD = out_BMPD + self.proj(y_BME).astype(jnp.float32)[:, :, None]
        return out_BMPD

    def init(self, rows, d_in):
        P, _, D = self.maps.shape
        return jnp.zeros((rows, P, D), jnp.float32), jnp.zeros((rows,), jnp.int32)

    def write(self, state, y_RE, prob_R, config):
        return self.outputs(y_RE[:, None])[:, 0], jnp.zeros_like(state[1])

    def read(self, state, is_boundary_R, config):
        outputs_RPD, distance_R = state
        distance_R = jnp.where(is_boundary_R, 0, distance_R + 1)
        take = jax.vmap(lambda outputs_PD, i: outputs_PD[i])
        out_RD = take(outputs_RPD, distance_R % self.maps.shape[0])
        if config.at_boundaries:
            out_RD = jnp.where(is_boundary_R[:, None], out_RD, 0.0)
        return (outputs_RPD, distance_R), out_RD

    def __call__(self, y_BME, boundaries, slots, config):
        outputs_BMPD = self.outputs(y_BME)
        index_BL = distances(boundaries) % self.maps.shape[0]
        take = jax.vmap(lambda outputs_MPD, m, i: outputs_MPD.at[m, i].get(mode="clip"))
        out_BLD = take(outputs_BMPD, slots.slot_BL, index_BL)
        reads_BL = slots.is_read_BL(boundaries.segment_ids_BL)
        if config.at_boundaries:
            reads_BL &= boundaries.boundary_mask_BL
        return jnp.where(reads_BL[..., None], out_BLD, 0.0)

    def after(self, y_BME, boundaries, slots, config):
        lengths_B = jnp.sum(boundaries.segment_ids_BL != 0, axis=1, dtype=jnp.int32)
        last = lambda a_BL: last_positions(a_BL, lengths_B, 1)[:, 0]
        has_read_B = last(slots.is_read_BL(boundaries.segment_ids_BL))
        take = jax.vmap(lambda outputs_MPD, m: outputs_MPD.at[m].get(mode="clip"))
        now_BPD = take(self.outputs(y_BME), last(slots.slot_BL))
        return jnp.where(has_read_B[:, None, None], now_BPD, 0.0), last(distances(boundaries))
