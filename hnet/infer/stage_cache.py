"""What a stage remembers of the rows that it has read, and how it comes to that from prompts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.dechunk import dechunk
from hnet.chunking.pool import chunk_ids, running_mean
from hnet.chunking.router import RouterOutput
from hnet.nn.cache import last_positions
from hnet.nn.context import Context
from hnet.stage import HNet


class Waiting(NamedTuple):
    """Rows between the encoder and the decoder of a stage, and what they have there."""

    fresh_B: jax.Array
    """whether the row has a chunk that the main network has not got yet"""
    inside_B: jax.Array
    """whether it has one that waits within the main network"""
    chunk_BD: jax.Array
    p_B: jax.Array
    residual_BD: jax.Array


class StageCache(NamedTuple):
    """What a stage remembers of B rows. D is the width of the stage."""

    position_B: jax.Array
    """positions that this stage has had"""
    max_len: jax.Array
    """positions that it has room for; a boundary outside that would need more is not taken"""
    stacks: dict[str, list]
    """layer caches of the encoder and decoder, or of the innermost main network"""
    previous_BD: jax.Array | None = None
    """encoder state of the last position, which the router compares with the next"""
    chunk_output_BD: jax.Array | None = None
    """what positions read from the main network until the next boundary, smoothed"""
    mean_BD: jax.Array | None = None
    """mean pool: mean of the encoder states in the unfinished chunk"""
    count_B: jax.Array | None = None
    """mean pool: positions in the unfinished chunk, float32"""
    waiting: Waiting | None = None
    inner: "StageCache | None" = None


def prefill_stage(
    stage: HNet,
    x_BLD: jax.Array,
    segment_ids_BL: jax.Array,
    lengths_B: jax.Array,
    max_lens: tuple[int, ...],
    *,
    route_ids_BL: jax.Array | None,
    boundaries_BL: jax.Array | None = None,
) -> tuple[jax.Array, list[RouterOutput], StageCache]:
    """`HNet.__call__` on rows of one segment each, and the cache that it leaves."""
    width, max_len, context = x_BLD.shape[-1], max_lens[0], Context(segment_ids_BL)
    x_BLD, stacks = stage.widen(x_BLD), {}

    def run(name, x):
        y, stacks[name] = getattr(stage, name).prefill(x, context, lengths_B, max_len)
        return y

    if stage.is_innermost:
        y_BLD = run("main_network", x_BLD)
        return y_BLD[..., :width], [], StageCache(lengths_B, jnp.int32(max_len), stacks)

    def last(a_BL):
        return last_positions(a_BL, lengths_B, 1)[:, 0]

    h_BLD = run("encoder", x_BLD)
    capacity = min(max_lens[1], x_BLD.shape[1] + stage.chunking.has_null)
    route = stage.route(
        h_BLD, segment_ids_BL, capacity, route_ids_BL=route_ids_BL, boundaries_BL=boundaries_BL
    )
    chunks = stage.chunk(h_BLD, route, capacity)
    num_slots_B = jnp.sum(chunks.segment_ids_BM != 0, axis=1, dtype=jnp.int32)
    y_BMD, routes, inner = prefill_stage(
        stage.main_network, chunks.x_BMD, chunks.segment_ids_BM, num_slots_B, max_lens[1:],
        route_ids_BL=chunks.route_ids_BM,
    )  # fmt: skip
    read_BLD = dechunk(y_BMD, chunks, route, stage.chunking.dechunk)
    out_BLD = run("decoder", read_BLD + stage.residual(h_BLD))
    open_chunk = {}
    if stage.chunking.pool == "mean":
        ids_BL = chunk_ids(route.boundary_mask_BL, segment_ids_BL)
        mean_BLD, count_BL = running_mean(h_BLD, ids_BL)
        count_BL = jnp.where(route.boundary_mask_BL, 0.0, count_BL)
        open_chunk = {"mean_BD": last(mean_BLD), "count_B": last(count_BL)}
    none_B, zeros_BD = jnp.zeros(lengths_B.shape, bool), jnp.zeros_like(last(h_BLD))
    waiting = Waiting(none_B, none_B, zeros_BD, jnp.zeros(lengths_B.shape), zeros_BD)
    cache = StageCache(
        lengths_B, jnp.int32(max_len), stacks, last(h_BLD), last(read_BLD), **open_chunk,
        waiting=waiting, inner=inner,
    )  # fmt: skip
    return out_BLD[..., :width], [route, *routes], cache
