"""One position of a stage, for the rows that have one.

A stage takes three steps: its encoder reads the position and the router decides; rows at a boundary
ask the main network, a stage again, once enough of them do; its decoder answers for the rows that
wait for nothing more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.chunking.dechunk import MIN_PROB
from hnet.chunking.router import decide
from hnet.infer.compact import on_rows
from hnet.infer.stage_cache import StageCache, Waiting
from hnet.nn.context import StepContext
from hnet.stage import HNet


class Pace(NamedTuple):
    """When main networks run, and on how many rows at once."""

    fractions: tuple[float, ...]
    """the sizes, as shares of B, of the batches that they run on; static"""
    patience: float | jax.Array
    """share of the rows yet to come that must wait at a boundary before it runs"""
    num_rows: jax.Array
    """how many rows there are to wait for"""


class Exchange(NamedTuple):
    """What passes between a stage and its main network within a step."""

    inner: StageCache
    read_BD: jax.Array
    """what positions read from the main network"""
    inside_B: jax.Array
    """rows that have a chunk within it"""
    answered_B: jax.Array
    """rows that it has answered in this step"""
    boundaries: tuple[list, ...] = ()
    """what the routers inside it made of each call"""


def step_stage(
    stage: HNet,
    x_BD: jax.Array,
    active_B: jax.Array,
    cache: StageCache,
    pace: Pace,
    *,
    is_outermost: bool = False,
    route_ids_B: jax.Array | None,
    boundary_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]], StageCache]:
    """A position of the active rows goes in, those of the rows that are done come out.

    Returns (output, done_B, (mask, p) of each stage, cache).
    """
    width, sizes = x_BD.shape[-1], None if is_outermost else pace.fractions
    x_BD = stage.widen(x_BD[:, None])[:, 0]
    if stage.is_innermost:
        y_BD, cache = _run("main_network", stage, x_BD, active_B, cache, sizes)
        return y_BD[:, :width], active_B, [], cache

    wanted_B, cache = _encode(stage, x_BD, active_B, cache, sizes, route_ids_B, boundary_B)
    cache, answered_B, inner_boundaries = _ask(stage, active_B, wanted_B, cache, pace, route_ids_B)
    waiting = cache.waiting
    done_B = (active_B | answered_B) & ~(waiting.fresh_B | waiting.inside_B)
    reads_B = answered_B if stage.chunking.dechunk == "scatter" else done_B
    x_BD = jnp.where(reads_B[:, None], cache.chunk_output_BD, 0.0) + waiting.residual_BD
    out_BD, cache = _run("decoder", stage, x_BD, done_B, cache, sizes)
    own = (answered_B, jnp.where(done_B, waiting.p_B, jnp.nan))
    return out_BD[:, :width], done_B, [own, *inner_boundaries], cache


def _run(
    name: str, stage: HNet, x_BD: jax.Array, on_B: jax.Array, cache: StageCache, sizes
) -> tuple[jax.Array, StageCache]:
    """The stack that a position of this stage ends with, on some rows."""

    def stack_step(inputs_R, caches, rows):
        x_RD, positions_R = inputs_R
        return getattr(stage, name).step(x_RD, caches, rows, StepContext(positions_R))

    inputs = (x_BD, cache.position_B)
    y_BD, stack = on_rows(stack_step, on_B, inputs, cache.stacks[name], sizes)
    position_B = cache.position_B + on_B.astype(jnp.int32)
    return y_BD, cache._replace(position_B=position_B, stacks=cache.stacks | {name: stack})


def _encode(
    stage: HNet, x_BD: jax.Array, active_B: jax.Array, cache: StageCache, sizes, route_ids_B,
    boundary_B,
) -> tuple[jax.Array, StageCache]:  # fmt: skip
    """Encoder, router and pool on the active rows: (whether a boundary is wanted, cache)."""

    def encode(inputs_R, caches, rows):
        x_RD, previous_RD, positions_R, *given = inputs_R
        h_RD, caches = stage.encoder.step(x_RD, caches, rows, StepContext(positions_R))
        p_R, wanted_R = _route(stage, previous_RD, h_RD, positions_R, *given)
        return (h_RD, stage.residual(h_RD[:, None])[:, 0], p_R, wanted_R), caches

    inputs = (x_BD, cache.previous_BD, cache.position_B, route_ids_B, boundary_B)
    (h_BD, residual_BD, p_B, wanted_B), stack = on_rows(
        encode, active_B, inputs, cache.stacks["encoder"], sizes
    )
    pooled_BD, mean_BD, count_B = _pool(stage, cache, h_BD)

    def keep(new, old):
        is_active = active_B.reshape(-1, *(1,) * (new.ndim - 1))
        return jnp.where(is_active, new, old)

    chunk_BD, p_B, residual_BD = map(keep, (pooled_BD, p_B, residual_BD), cache.waiting[2:])
    cache = cache._replace(
        stacks=cache.stacks | {"encoder": stack},
        previous_BD=keep(h_BD, cache.previous_BD),
        waiting=Waiting(*cache.waiting[:2], chunk_BD, p_B, residual_BD),
    )
    if mean_BD is not None:
        mean_BD, count_B = keep(mean_BD, cache.mean_BD), keep(count_B, cache.count_B)
        cache = cache._replace(mean_BD=mean_BD, count_B=count_B)
    return wanted_B, cache


def _ask(
    stage: HNet, active_B: jax.Array, wanted_B: jax.Array, cache: StageCache, pace: Pace,
    route_ids_B,
) -> tuple[StageCache, jax.Array, list[tuple[jax.Array, jax.Array]]]:  # fmt: skip
    """Chunks of the rows at a boundary go into the main network once enough rows have one.

    Returns (cache, rows that were answered, (mask, p) of each stage inside).
    """
    waiting, none_B = cache.waiting, jnp.zeros_like(active_B)
    exchange = Exchange(cache.inner, cache.chunk_output_BD, waiting.inside_B, none_B)

    def call(exchange, chunk_BD, gate_B, asks_B, pace, own=True):
        y_BD, found_B, boundaries, inner = step_stage(
            stage.main_network, chunk_BD, asks_B, exchange.inner, pace, route_ids_B=route_ids_B
        )
        inside_B = exchange.inside_B
        return Exchange(
            inner,
            _smooth(stage.chunking.dechunk, exchange.read_BD, y_BD, gate_B, found_B),
            (inside_B | asks_B) & ~found_B,
            exchange.answered_B | found_B & (inside_B | (asks_B & own)),
            (*exchange.boundaries, boundaries),
        )

    def has_room(inner):
        return inner.position_B < inner.max_len

    if stage.chunking.has_null:  # a row's first position opens the null slot before its own
        null_BD = jnp.broadcast_to(stage.null_group[...][None], waiting.chunk_BD.shape)
        first_B = active_B & (cache.position_B == 0) & has_room(exchange.inner)
        gate_B = jnp.where(first_B, 1.0, waiting.p_B)
        alone = pace._replace(fractions=(), patience=0.0)
        exchange = call(exchange, null_BD, gate_B, first_B, alone, own=False)
        # what further stages made of the null slot is told with the position, so that must not wait
        pace = pace._replace(patience=jnp.where(jnp.any(first_B), 0.0, pace.patience))
    opens_B = active_B & wanted_B & has_room(exchange.inner)
    fresh_B = waiting.fresh_B | opens_B
    to_come = pace.num_rows - jnp.sum(exchange.inside_B, dtype=jnp.int32)
    enough = jnp.sum(fresh_B, dtype=jnp.float32) >= pace.patience * to_come.astype(jnp.float32)
    asks_B = fresh_B & enough
    exchange = call(exchange, waiting.chunk_BD, waiting.p_B, asks_B, pace)
    cache = cache._replace(
        inner=exchange.inner,
        chunk_output_BD=exchange.read_BD,
        waiting=waiting._replace(fresh_B=fresh_B & ~asks_B, inside_B=exchange.inside_B),
    )
    if cache.count_B is not None:
        cache = cache._replace(count_B=jnp.where(opens_B, 0.0, cache.count_B))
    return cache, exchange.answered_B, [*map(_latest, zip(*exchange.boundaries))]


def _latest(calls: tuple) -> tuple[jax.Array, jax.Array]:
    """One stage's (mask, p) of a byte that may have given it two positions, a null slot first."""
    (mask_B, p_B), *later = calls
    for later_mask_B, later_p_B in later:
        mask_B = mask_B | later_mask_B
        p_B = jnp.where(jnp.isnan(later_p_B), p_B, later_p_B)
    return mask_B, p_B


def window_segments(position_B: jax.Array) -> jax.Array:
    """Segment ids (B, 2) of the last position, if there was one, and the next."""
    return jnp.stack([position_B > 0, position_B >= 0], axis=1).astype(jnp.int32)


def _route(
    stage: HNet, previous_RD, h_RD, positions_R, route_ids_R, boundary_R
) -> tuple[jax.Array, jax.Array]:
    """(p, whether a boundary is wanted): the router on the last position and this one.

    That is all a router may look at, but for the fixed one, which counts positions.
    """
    pair = lambda a: None if a is None else jnp.stack([a, a], axis=1)
    segment_ids_R2, chunking = window_segments(positions_R), stage.chunking
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
