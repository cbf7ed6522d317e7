"""Streaming: the network one byte at a time, for a batch whose rows have different boundaries.

`prefill` runs the parallel form on prompts and returns a cache; `step` feeds one byte to every row.
A stage runs only on the rows that have a position for it, gathered into a batch of one of a few
fixed sizes, so that the cost of a step depends on the boundaries. `advance` can also let rows wait
at a boundary until enough of them can run the main network as one batch: while reading the weights
dominates its time, many rows cost little more than one. The cache is one pytree of arrays; donate
it to avoid a copy per step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.part import where_rows
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.model import HNetLM
from hnet.nn.active_rows import FRACTIONS
from hnet.nn.cache import last_positions
from hnet.nn.context import Context
from hnet.stage import Pace, Prompts, StageCache


class ModelCache(NamedTuple):
    """State of the model for B rows."""

    stage: StageCache
    embedding: Any = ()


class ByteBoundaries(NamedTuple):
    """Decisions of each chunking stage at one byte, outermost first."""

    mask_BS: jax.Array
    """whether there is a boundary"""
    prob_BS: jax.Array
    """boundary probability p; NaN where the stage has no position at this byte"""


def full_lens(config: HNetConfig, num_bytes: int) -> tuple[int, ...]:
    """`max_lens` for texts of `num_bytes` bytes: enough for every position to be a boundary."""
    lens = [num_bytes]
    for stage in config.stages[:-1]:
        slots = lens[-1] + stage.chunking.has_null_chunk
        lens.append(slots * stage.chunking.slots_per_chunk)
    return tuple(lens)


def check_streams(config: HNetConfig) -> None:
    """Raise ConfigError for a predictor that does not support streaming."""
    for stage in config.stages[:-1]:
        if problem := stage.chunking.predictor.streaming_problem():
            raise ConfigError(f"chunking.predictor.{problem}")


def prefill(
    model: HNetLM,
    input_ids_BL: jax.Array,
    lengths_B: jax.Array,
    max_lens: tuple[int, ...],
    *,
    route_ids_BL: jax.Array | None = None,
    boundaries_BL: jax.Array | None = None,
) -> tuple[jax.Array, list[Boundaries], ModelCache]:
    """Read prompts of different lengths, padded on the right; a length may be 0.

    max_lens: number of positions per stage in the cache, outermost (bytes) first; see `full_lens`.
    Smaller values clip chunks like a capacity in the forward pass. route_ids_BL, boundaries_BL: as
    in `HNetLM`. Returns the logits after the last byte of each row (zeros, i.e. uniform, for an
    empty row), the boundaries of the stages, and the cache. Raises ConfigError for a predictor that
    does not support streaming.
    """
    check_streams(model.config)
    position_L = jnp.arange(input_ids_BL.shape[1], dtype=jnp.int32)
    segment_ids_BL = (position_L[None, :] < lengths_B[:, None]).astype(jnp.int32)
    context = model.context(input_ids_BL, segment_ids_BL, route_ids_BL, boundaries_BL)
    x_BLD, stage, boundaries = model.backbone.prefill(
        model.embeddings(input_ids_BL, context), context, Prompts(lengths_B, max_lens)
    )
    logits_BV, cache = after_prompts(model, x_BLD, context, input_ids_BL, lengths_B, stage)
    return logits_BV, boundaries, cache


def after_prompts(
    model: HNetLM,
    x_BLD: jax.Array,
    context: Context,
    input_ids_BL: jax.Array,
    lengths_B: jax.Array,
    stage: StageCache,
) -> tuple[jax.Array, ModelCache]:
    """(logits, cache) of `prefill`, from the output and the cache of the backbone."""
    cache = ModelCache(stage, model.embeddings.after(input_ids_BL, context))
    logits_B1V = model.logits(last_positions(x_BLD, lengths_B, 1))
    return jnp.where((lengths_B > 0)[:, None], logits_B1V[:, 0], 0.0), cache


def step(
    model: HNetLM,
    cache: ModelCache,
    byte_B: jax.Array,
    active_B: jax.Array | None = None,
    *,
    route_ids_B: jax.Array | None = None,
    boundary_B: jax.Array | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
) -> tuple[jax.Array, ByteBoundaries, ModelCache]:
    """Feed one byte to every row: (logits (B, V), boundaries, cache).

    Rows that are not `active_B` do not change; their logits have no meaning. route_ids_B,
    boundary_B: values for this byte, as in `HNetLM`. fractions (static): batch sizes of the inner
    stages, as shares of B.
    """
    if active_B is None:
        active_B = jnp.ones(byte_B.shape, bool)
    logits_BV, boundaries, _, cache = advance(
        model, cache, byte_B, active_B,
        route_ids_B=route_ids_B, boundary_B=boundary_B, fractions=fractions, wait_share=0.0,
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
    wait_share: float | jax.Array,
) -> tuple[jax.Array, ByteBoundaries, jax.Array, ModelCache]:
    """`step` for rows that may wait: (logits (B, V), boundaries, done_B, cache).

    A row at a boundary waits until a share `wait_share` of the rows that have not yet entered the
    main network also wait; with 0 no row waits. Logits and boundaries are valid for rows with
    done_B, which have finished their byte. Call again for the other rows, with the same byte and
    route and with active_B False, until they are done. The results of a row do not depend on how
    long it waits. For every wait_share at least one row makes progress.
    """
    context = model.context(byte_B, jnp.ones_like(byte_B), route_ids_B, boundary_B)
    at_work_B = active_B
    if (waiting := cache.stage.waiting) is not None:
        at_work_B = active_B | waiting.fresh_B | waiting.inside_B
    pace = Pace(fractions, wait_share, jnp.sum(at_work_B, dtype=jnp.int32))
    embedding, x_BD = model.embeddings.step(cache.embedding, byte_B)
    embedding = where_rows(active_B, embedding, cache.embedding)
    x_BD, done_B, boundaries, stage = model.backbone.step(
        x_BD, active_B, cache.stage, pace, context, is_outermost=True
    )
    none = (jnp.zeros((len(byte_B), 0), bool), jnp.zeros((len(byte_B), 0)))
    boundaries = ByteBoundaries(
        *(jnp.stack(a, 1) for a in zip(*boundaries)) if boundaries else none
    )
    logits_BV = model.logits(x_BD[:, None])[:, 0]
    return logits_BV, boundaries, done_B, ModelCache(stage, embedding)


def boundaries_at_bytes(
    config: HNetConfig, masks: list[np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """Convert masks over the positions of each stage (B, L_s) to boundaries at bytes.

    shape: (B, L_0). Returns bool (B, L_0, chunking stages): whether the stage has a boundary at the
    byte. A null chunk is at the first byte of its row.
    """
    out_BLS = np.zeros((*shape, len(masks)), bool)
    for row in range(shape[0]):
        byte_of = np.arange(shape[1])
        for s, mask_BL in enumerate(masks):
            cuts = byte_of[np.flatnonzero(mask_BL[row, : len(byte_of)])]
            out_BLS[row, cuts, s] = True
            null = byte_of[: config.stages[s].chunking.has_null_chunk]
            byte_of = np.concatenate([null, cuts])
    return out_BLS
