"""Streaming: the same network one byte at a time, for a batch of rows that cut at different times.

`prefill` reads prompts in parallel form and leaves a cache; `step` feeds one byte to every row. A
stage runs only on the rows that have a position for it, gathered into a batch of one of a few
fixed sizes, so that the cost of a step follows the boundaries. The cache is one pytree of arrays;
donate it, and no step copies it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.chunk import chunk
from hnet.chunking.dechunk import MIN_PROB, dechunk
from hnet.chunking.router import RouterOutput, cosine_boundary_prob, decide
from hnet.infer.compact import FRACTIONS, on_rows
from hnet.model import HNetLM
from hnet.nn.cache import last_positions, read, write
from hnet.stage import HNet


class StageCache(NamedTuple):
    """What a stage remembers of B rows. D is the width of the stage."""

    position_B: jax.Array
    """positions that this stage has had"""
    max_len: jax.Array
    """positions that it has room for; a boundary outside that would need more is not taken"""
    stacks: dict[str, list]
    """layer caches of the encoder and decoder, or of the innermost main network"""
    query_BD: jax.Array | None = None
    """the router's query of the last position"""
    smoothed_BD: jax.Array | None = None
    """z: the smoothed output of the last chunk"""
    inner: "StageCache | None" = None


def prefill(
    model: HNetLM,
    input_ids_BL: jax.Array,
    lengths_B: jax.Array,
    max_lens: tuple[int, ...],
) -> tuple[jax.Array, list[RouterOutput], StageCache]:
    """Read prompts of different lengths, padded on the right; a length may be 0.

    max_lens: positions of each stage that the cache has room for, the outermost in bytes. Returns
    the logits after each row's last byte (zeros, that is no opinion, for an empty row), what the
    routers decided, and the cache.
    """
    position_L = jnp.arange(input_ids_BL.shape[1], dtype=jnp.int32)
    segment_ids_BL = (position_L[None, :] < lengths_B[:, None]).astype(jnp.int32)
    x_BLD = model.embeddings(input_ids_BL)
    x_BLD, routes, cache = _prefill_stage(
        model.backbone, x_BLD, segment_ids_BL, lengths_B, max_lens
    )
    logits_B1V = model._logits(last_positions(x_BLD, lengths_B, 1))
    return jnp.where((lengths_B > 0)[:, None], logits_B1V[:, 0], 0.0), routes, cache


def _prefill_stage(
    stage: HNet, x_BLD, segment_ids_BL, lengths_B, max_lens
) -> tuple[jax.Array, list[RouterOutput], StageCache]:
    width, max_len = x_BLD.shape[-1], max_lens[0]
    x_BLD, stacks = stage.widen(x_BLD), {}

    def run(name, x):
        y, stacks[name] = getattr(stage, name).prefill(x, segment_ids_BL, lengths_B, max_len)
        return y

    def cache(**fields):
        return StageCache(lengths_B, jnp.int32(max_len), stacks, **fields)

    if stage.is_innermost:
        return run("main_network", x_BLD)[..., :width], [], cache()
    h_BLD = run("encoder", x_BLD)
    capacity = min(max_lens[1], x_BLD.shape[1])
    route = decide(stage.routing_module(h_BLD, segment_ids_BL), segment_ids_BL, capacity)
    chunks = chunk(h_BLD, route.boundary_mask_BL, route.boundary_prob_BL, segment_ids_BL, capacity)
    num_chunks_B = jnp.sum(route.boundary_mask_BL, axis=1, dtype=jnp.int32)
    y_BMD, routes, inner = _prefill_stage(
        stage.main_network, chunks.x_BMD, chunks.segment_ids_BM, num_chunks_B, max_lens[1:]
    )
    z_BLD = dechunk(y_BMD, chunks, route)
    out_BLD = run("decoder", z_BLD + stage.residual_proj(h_BLD))
    last_h_B1D = last_positions(h_BLD, lengths_B, 1)
    new_cache = cache(
        query_BD=stage.routing_module.q_proj_layer(last_h_B1D)[:, 0],
        smoothed_BD=last_positions(z_BLD, lengths_B, 1)[:, 0],
        inner=inner,
    )
    return out_BLD[..., :width], [route, *routes], new_cache


def step(
    model: HNetLM,
    cache: StageCache,
    byte_B: jax.Array,
    active_B: jax.Array | None = None,
    *,
    fractions: tuple[float, ...] = FRACTIONS,
) -> tuple[jax.Array, jax.Array, StageCache]:
    """Feed one byte to every row: (logits (B, V), boundaries bool (B, stages that cut), cache).

    Rows that are not `active_B` stay as they are; their logits mean nothing. fractions (static):
    sizes, as shares of B, of the batches that inner stages run on.
    """
    if active_B is None:
        active_B = jnp.ones(byte_B.shape, bool)
    x_BD = model.embeddings(byte_B)
    x_BD, boundaries, cache = _step_stage(model.backbone, x_BD, active_B, cache, (1.0,), fractions)
    boundaries_BS = jnp.stack(boundaries, 1) if boundaries else jnp.zeros((len(byte_B), 0), bool)
    return model._logits(x_BD[:, None])[:, 0], boundaries_BS, cache


def _step_stage(
    stage: HNet, x_BD, active_B, cache: StageCache, fractions, inner_fractions
) -> tuple[jax.Array, list[jax.Array], StageCache]:
    width, positions_B = x_BD.shape[-1], cache.position_B
    x_BD = stage.widen(x_BD[:, None])[:, 0]
    stacks = dict(cache.stacks)

    def run(name, x_RD, caches, rows_R):
        return getattr(stage, name).step(x_RD, caches, rows_R, read(positions_B, rows_R))

    def finish(**fields):
        advanced_B = positions_B + active_B.astype(jnp.int32)
        return cache._replace(position_B=advanced_B, stacks=stacks, **fields)

    if stage.is_innermost:

        def main(x_RD, caches, rows_R):
            return run("main_network", x_RD, caches, rows_R)

        y_BD, stacks["main_network"] = on_rows(
            main, active_B, x_BD, stacks["main_network"], fractions
        )
        return y_BD[:, :width], [], finish()

    def encode(x_RD, state, rows_R):
        caches, query_BD = state
        h_RD, caches = run("encoder", x_RD, caches, rows_R)
        p_R, query_RD = _route(stage, h_RD, read(query_BD, rows_R), read(positions_B, rows_R))
        out = (h_RD, p_R, stage.residual_proj(h_RD))
        return out, (caches, write(query_BD, rows_R, query_RD))

    (h_BD, p_B, residual_BD), (stacks["encoder"], query_BD) = on_rows(
        encode, active_B, x_BD, (stacks["encoder"], cache.query_BD), fractions
    )
    boundary_B = active_B & (p_B > 0.5) & (cache.inner.position_B < cache.inner.max_len)
    y_BD, boundaries, inner = _step_stage(
        stage.main_network, h_BD, boundary_B, cache.inner, inner_fractions, inner_fractions
    )
    gate_B1 = jnp.where(boundary_B, jnp.clip(p_B, MIN_PROB, 1 - MIN_PROB), 0.0)[:, None]
    z_BD = gate_B1 * y_BD.astype(jnp.float32) + (1 - gate_B1) * cache.smoothed_BD

    def decode(x_RD, caches, rows_R):
        return run("decoder", x_RD, caches, rows_R)

    y_BD, stacks["decoder"] = on_rows(
        decode, active_B, z_BD + residual_BD, stacks["decoder"], fractions
    )
    finished = finish(query_BD=query_BD, smoothed_BD=z_BD, inner=inner)
    return y_BD[:, :width], [boundary_B, *boundaries], finished


def _route(stage, h_RD, query_RD, positions_R):
    q_RD, k_RD = stage.routing_module.q_proj_layer(h_RD), stage.routing_module.k_proj_layer(h_RD)
    pair = jnp.stack([query_RD, q_RD], 1), jnp.stack([k_RD, k_RD], 1)
    p_R = cosine_boundary_prob(*pair, jnp.ones((len(h_RD), 2), jnp.int32))[:, 1]
    return jnp.where(positions_R == 0, 1.0, p_R), q_RD
