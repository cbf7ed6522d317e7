"""Streaming: the same network one byte at a time, for a batch of rows that cut at different times.

`prefill` reads prompts in parallel form and leaves a cache; `step` feeds one byte to every row. A
stage runs only on the rows that have a position for it, gathered into a batch of one of a few
fixed sizes, so that the cost of a step follows the boundaries. `advance` may also let rows wait at
a boundary until more of them have come to one: a main network costs little more for many rows than
for one, as long as reading its weights takes most of its time. The cache is one pytree of arrays;
donate it, and no step copies it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.chunking.dechunk import MIN_PROB, dechunk
from hnet.chunking.pool import chunk_ids, running_mean
from hnet.chunking.router import RouterOutput, decide
from hnet.config import ConfigError, HNetConfig
from hnet.infer.compact import FRACTIONS, on_rows
from hnet.model import HNetLM
from hnet.nn.cache import last_positions
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


class ModelCache(NamedTuple):
    """What the model remembers of B rows."""

    last_byte_B: jax.Array
    """the byte before the next; rules compare the two"""
    stage: StageCache


class Boundaries(NamedTuple):
    """What the routers made of one byte, for each stage that cuts, outermost first."""

    mask_BS: jax.Array
    """whether there is a boundary"""
    prob_BS: jax.Array
    """p; NaN where the byte gave the stage no position"""


def full_lens(config: HNetConfig, num_bytes: int) -> tuple[int, ...]:
    """`max_lens` with room for any boundaries in texts of `num_bytes`."""
    lens = [num_bytes]
    for stage in config.stages[:-1]:
        lens.append(lens[-1] + stage.chunking.has_null)
    return tuple(lens)


def prefill(
    model: HNetLM,
    input_ids_BL: jax.Array,
    lengths_B: jax.Array,
    max_lens: tuple[int, ...],
    *,
    route_ids_BL: jax.Array | None = None,
    boundaries_BL: jax.Array | None = None,
) -> tuple[jax.Array, list[RouterOutput], ModelCache]:
    """Read prompts of different lengths, padded on the right; a length may be 0.

    max_lens: positions of each stage that the cache has room for, the outermost in bytes; see
    `full_lens`. A smaller one clips as a capacity of the forward pass does. route_ids_BL,
    boundaries_BL: as in `HNetLM`. Returns the logits after each row's last byte (zeros, that is no
    opinion, for an empty row), what the routers decided, and the cache. Raises ConfigError for a
    router that draws noise.
    """
    if any(s.chunking.reference_noise_at_evaluation for s in model.config.stages[:-1]):
        raise ConfigError(
            "chunking.reference_noise_at_evaluation=True redraws the boundaries of a text each "
            "time it is read, so nothing can be continued: set it to False"
        )
    position_L = jnp.arange(input_ids_BL.shape[1], dtype=jnp.int32)
    segment_ids_BL = (position_L[None, :] < lengths_B[:, None]).astype(jnp.int32)
    x_BLD, routes, stage = _prefill_stage(
        model.backbone, model.embeddings(input_ids_BL), segment_ids_BL, lengths_B, max_lens,
        route_ids_BL=model.checked_routes(route_ids_BL),
        boundaries_BL=model.boundaries(input_ids_BL, segment_ids_BL, boundaries_BL),
    )  # fmt: skip
    logits_B1V = model.logits(last_positions(x_BLD, lengths_B, 1))
    logits_BV = jnp.where((lengths_B > 0)[:, None], logits_B1V[:, 0], 0.0)
    last_byte_B = last_positions(input_ids_BL, lengths_B, 1)[:, 0]
    return logits_BV, routes, ModelCache(last_byte_B, stage)


def _prefill_stage(
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
    width, max_len = x_BLD.shape[-1], max_lens[0]
    x_BLD, stacks = stage.widen(x_BLD), {}

    def run(name, x):
        y, stacks[name] = getattr(stage, name).prefill(x, segment_ids_BL, lengths_B, max_len)
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
    y_BMD, routes, inner = _prefill_stage(
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


def step(
    model: HNetLM,
    cache: ModelCache,
    byte_B: jax.Array,
    active_B: jax.Array | None = None,
    *,
    route_ids_B: jax.Array | None = None,
    boundary_B: jax.Array | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
) -> tuple[jax.Array, Boundaries, ModelCache]:
    """Feed one byte to every row: (logits (B, V), boundaries, cache).

    Rows that are not `active_B` stay as they are; their logits mean nothing. route_ids_B,
    boundary_B: of this byte, as in `HNetLM`. fractions (static): the sizes, as shares of B, of the
    batches that inner stages run on.
    """
    if active_B is None:
        active_B = jnp.ones(byte_B.shape, bool)
    logits_BV, boundaries, _, cache = advance(
        model, cache, byte_B, active_B,
        route_ids_B=route_ids_B, boundary_B=boundary_B, fractions=fractions, patience=0.0,
    )  # fmt: skip
    return logits_BV, boundaries, cache


def advance(
    model: HNetLM,
    cache: ModelCache,
    byte_B: jax.Array,
    active_B: jax.Array,
    *,
    route_ids_B: jax.Array | None = None,
    boundary_B: jax.Array | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
    patience: float | jax.Array,
) -> tuple[jax.Array, Boundaries, jax.Array, ModelCache]:
    """`step` for rows that need not keep pace: (logits (B, V), boundaries, done_B, cache).

    A row at a boundary waits until a share `patience` of the rows that have not gone on
    into the main network wait there too; with 0 none waits. The logits and boundaries are those of
    rows that are done with their byte. The others must be given the same byte and route again
    without being active, until they are done. What a row gets does not depend on when it gets it,
    and whatever the patience, some row gets on.
    """
    position_B = cache.stage.position_B
    window_B2 = jnp.stack([cache.last_byte_B, byte_B], axis=1)
    given_B2 = None if boundary_B is None else jnp.stack([boundary_B, boundary_B], axis=1)
    given_B2 = model.boundaries(window_B2, _window_segments(position_B), given_B2)
    at_work_B = active_B
    if (waiting := cache.stage.waiting) is not None:
        at_work_B = active_B | waiting.fresh_B | waiting.inside_B
    x_BD, done_B, boundaries, stage = _step_stage(
        model.backbone, model.embeddings(byte_B), active_B, cache.stage, None, fractions,
        patience, jnp.sum(at_work_B, dtype=jnp.int32),
        route_ids_B=model.checked_routes(route_ids_B),
        boundary_B=None if given_B2 is None else given_B2[:, 1],
    )  # fmt: skip
    none = (jnp.zeros((len(byte_B), 0), bool), jnp.zeros((len(byte_B), 0)))
    boundaries = Boundaries(*(jnp.stack(a, 1) for a in zip(*boundaries)) if boundaries else none)
    last_byte_B = jnp.where(active_B, byte_B, cache.last_byte_B)
    logits_BV = model.logits(x_BD[:, None])[:, 0]
    return logits_BV, boundaries, done_B, ModelCache(last_byte_B, stage)


def _step_stage(
    stage: HNet,
    x_BD: jax.Array,
    active_B: jax.Array,
    cache: StageCache,
    own_fractions: tuple[float, ...] | None,
    fractions: tuple[float, ...],
    patience: float | jax.Array,
    num_rows: jax.Array,
    *,
    route_ids_B: jax.Array | None,
    boundary_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]], StageCache]:
    """A position of the active rows goes in, those of the rows that are done come out.

    `own_fractions` for this stage, `fractions` further in. num_rows: how many there are to wait
    for. Returns (output, done_B, (mask, p) of each stage, cache).
    """
    width, position_B = x_BD.shape[-1], cache.position_B
    x_BD, stacks = stage.widen(x_BD[:, None])[:, 0], dict(cache.stacks)

    def run(name, x_BD, on_B):
        def stack_step(inputs_R, caches, rows):
            x_RD, positions_R = inputs_R
            return getattr(stage, name).step(x_RD, caches, rows, positions_R)

        y_BD, stacks[name] = on_rows(
            stack_step, on_B, (x_BD, position_B), stacks[name], own_fractions
        )
        return y_BD

    if stage.is_innermost:
        y_BD = run("main_network", x_BD, active_B)
        cache = cache._replace(position_B=position_B + active_B.astype(jnp.int32), stacks=stacks)
        return y_BD[:, :width], active_B, [], cache

    def encode(inputs_R, caches, rows):
        x_RD, previous_RD, positions_R, *given = inputs_R
        h_RD, caches = stage.encoder.step(x_RD, caches, rows, positions_R)
        p_R, wanted_R = _route(stage, previous_RD, h_RD, positions_R, *given)
        return (h_RD, stage.residual(h_RD[:, None])[:, 0], p_R, wanted_R), caches

    inputs = (x_BD, cache.previous_BD, position_B, route_ids_B, boundary_B)
    (h_BD, residual_BD, p_B, wanted_B), stacks["encoder"] = on_rows(
        encode, active_B, inputs, stacks["encoder"], own_fractions
    )
    pooled_BD, mean_BD, count_B = _pool(stage, cache, h_BD)
    keep = lambda new, old: jnp.where(active_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    chunk_BD, p_B, residual_BD = map(keep, (pooled_BD, p_B, residual_BD), cache.waiting[2:])

    inner, read_BD, inside_B = cache.inner, cache.chunk_output_BD, cache.waiting.inside_B
    answered_B, inner_boundaries = jnp.zeros_like(active_B), []

    def ask(chunk_BD, gate_B, asks_B, sizes, patience, own=True):
        nonlocal inner, read_BD, inside_B, answered_B
        y_BD, found_B, inner_boundary, inner = _step_stage(
            stage.main_network, chunk_BD, asks_B, inner, sizes, sizes, patience, num_rows,
            route_ids_B=route_ids_B,
        )  # fmt: skip
        read_BD = _smooth(stage.chunking.dechunk, read_BD, y_BD, gate_B, found_B)
        answered_B |= found_B & (inside_B | (asks_B & own))
        inside_B = (inside_B | asks_B) & ~found_B
        inner_boundaries.append(inner_boundary)

    if stage.chunking.has_null:  # a row's first position opens the null slot before its own
        null_BD = jnp.broadcast_to(stage.null_group[...][None], h_BD.shape)
        first_B = active_B & (position_B == 0) & (inner.position_B < inner.max_len)
        ask(null_BD, jnp.where(first_B, 1.0, p_B), first_B, (), 0.0, own=False)
        # what further stages made of the null slot is told with the position, so that must not wait
        patience = jnp.where(jnp.any(first_B), 0.0, patience)
    opens_B = active_B & wanted_B & (inner.position_B < inner.max_len)
    fresh_B = cache.waiting.fresh_B | opens_B
    to_come = (num_rows - jnp.sum(inside_B, dtype=jnp.int32)).astype(jnp.float32)
    enough = jnp.sum(fresh_B, dtype=jnp.float32) >= patience * to_come
    asks_B = fresh_B & enough
    ask(chunk_BD, p_B, asks_B, fractions, patience)
    fresh_B &= ~asks_B
    done_B = (active_B | answered_B) & ~(fresh_B | inside_B)
    reads_B = answered_B if stage.chunking.dechunk == "scatter" else done_B
    out_BD = run("decoder", jnp.where(reads_B[:, None], read_BD, 0.0) + residual_BD, done_B)
    new_cache = cache._replace(
        position_B=position_B + done_B.astype(jnp.int32), stacks=stacks, inner=inner,
        chunk_output_BD=read_BD,
        previous_BD=keep(h_BD, cache.previous_BD),
        waiting=Waiting(fresh_B, inside_B, chunk_BD, p_B, residual_BD),
    )  # fmt: skip
    if mean_BD is not None:
        count_B = jnp.where(opens_B, 0.0, count_B)
        new_cache = new_cache._replace(
            mean_BD=keep(mean_BD, cache.mean_BD), count_B=keep(count_B, cache.count_B)
        )
    own = (answered_B, jnp.where(done_B, p_B, jnp.nan))
    return out_BD[:, :width], done_B, [own, *map(_latest, zip(*inner_boundaries))], new_cache


def _latest(calls: tuple) -> tuple[jax.Array, jax.Array]:
    """One stage's (mask, p) of a byte that may have given it two positions, a null slot first."""
    (mask_B, p_B), *later = calls
    for later_mask_B, later_p_B in later:
        mask_B = mask_B | later_mask_B
        p_B = jnp.where(jnp.isnan(later_p_B), p_B, later_p_B)
    return mask_B, p_B


def _window_segments(position_B: jax.Array) -> jax.Array:
    """Segment ids (B, 2) of the last position, if there was one, and the next."""
    return jnp.stack([position_B > 0, position_B >= 0], axis=1).astype(jnp.int32)


def _route(
    stage: HNet, previous_RD, h_RD, positions_R, route_ids_R, boundary_R
) -> tuple[jax.Array, jax.Array]:
    """(p, whether a boundary is wanted): the router on the last position and this one.

    That is all a router may look at, but for the fixed one, which counts positions.
    """
    pair = lambda a: None if a is None else jnp.stack([a, a], axis=1)
    segment_ids_R2, chunking = _window_segments(positions_R), stage.chunking
    if chunking.router == "fixed":
        p_R = (positions_R % int(chunking.target_ratio) == 0).astype(jnp.float32)
        route = decide(pair(p_R), segment_ids_R2, 3, alignment=chunking.alignment)
    else:
        route = stage.route(
            jnp.stack([previous_RD, h_RD], axis=1), segment_ids_R2, 3,
            route_ids_BL=pair(route_ids_R), boundaries_BL=pair(boundary_R),
        )  # fmt: skip
    return route.boundary_prob_BL[:, 1], route.boundary_mask_BL[:, 1]


def _pool(stage: HNet, cache: StageCache, h_BD) -> tuple[jax.Array, ...]:
    """(what the chunk would be if it ended here, mean and number of its positions so far)."""
    if stage.chunking.pool != "mean":
        return h_BD, None, None
    count_B = cache.count_B + 1
    share_B1 = (1 / count_B)[:, None]
    mean_BD = share_B1 * h_BD + (1 - share_B1) * cache.mean_BD
    return mean_BD, mean_BD, count_B


def _smooth(how: str, read_BD, y_BD, p_B, found_B) -> jax.Array:
    """What positions read after the main network has returned `y_BD` for some rows."""
    gate_B = jnp.clip(p_B, MIN_PROB, 1 - MIN_PROB) if how == "ema" else jnp.ones_like(p_B)
    gate_B1 = jnp.where(found_B, gate_B, 0.0)[:, None]
    return gate_B1 * y_BD.astype(jnp.float32) + (1 - gate_B1) * read_BD


def byte_boundaries(
    config: HNetConfig, masks: list[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """Masks over each stage's own positions (B, L_s) -> whether each byte has a boundary of it.

    shape: (B, L_0). Returns bool (B, L_0, stages that cut). A null slot lies at a row's first byte.
    """
    out_BLS = np.zeros((*shape, len(masks)), bool)
    for row in range(shape[0]):
        byte_of = np.arange(shape[1])
        for s, mask_BL in enumerate(masks):
            cuts = byte_of[np.flatnonzero(mask_BL[row, : len(byte_of)])]
            out_BLS[row, cuts, s] = True
            null = byte_of[: config.stages[s].chunking.has_null]
            byte_of = np.concatenate([null, cuts])
    return out_BLS
