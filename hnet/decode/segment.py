"""Segmentation of given texts by a model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.boundaries import Boundaries
from hnet.config import BOS_ID, HNetConfig
from hnet.data.scripts import SCRIPTS, route_table, script_ids_of_rows
from hnet.decode.by_counts import Done, Fed, Static, forward
from hnet.decode.prompts import row_length
from hnet.inspect.segmentation import Segmentation
from hnet.loss import next_byte_nll

ROWS = 32  # maximum number of texts per batch
POSITIONS = ROWS * 1024  # maximum number of positions per batch; bounds the memory of logits


def _routed(logits: jax.Array, records: list[Boundaries], ids_BL: jax.Array):
    """([(boundary mask, boundary probability) of each stage, outermost first], nats per byte)."""
    stages = [(r.boundary_mask_BL, r.boundary_prob_BL) for r in records]
    return stages, next_byte_nll(logits, ids_BL)


def _routed_by_counts(done: Done):
    return _routed(done.logits_BLV, done.boundaries, done.fed.input_ids_BL)


def segmenter(
    graph: nnx.GraphDef, model: HNetConfig, out_shardings: Any = None, *, bos: bool
) -> Callable[..., list[Segmentation]]:
    """Return a function (params, texts, names, gold) -> segmentations; compiles once per shape.

    out_shardings: sharding of the results of a training run, which shows few texts while its
    boundaries move: they run with all slots, in one program. Without it a main network has as many
    slots as the boundaries need.

    bos: whether each text is a row of its own after byte 254, as in training. Without it no byte
    predicts the first one, and the segmentations have no surprisal. Each byte gets the name of
    its route, or of its script if the model has only one route.
    """
    static = Static(graph, model)
    in_one = jax.jit(
        lambda params, fed: _routed(
            *nnx.merge(graph, params)(*fed[:2], route_ids_BL=fed.route_ids_BL), fed.input_ids_BL
        ),
        out_shardings=out_shardings,
    )

    def run(params, fed):
        if out_shardings is None:
            return forward(static, params, fed, _routed_by_counts)
        return in_one(params, fed)

    route_of = route_table(model.route_groups, "model.route_groups")

    def segment(
        params: Any,
        texts: Sequence[bytes],
        names: Sequence[str] = (),
        gold: Sequence[dict | None] = (),
    ) -> list[Segmentation]:
        length = _padded(max((len(t) for t in texts), default=0))
        ids_BL = np.zeros((len(texts), length), np.int32)
        segment_ids_BL = np.zeros_like(ids_BL)
        for row, text in enumerate(texts):
            fed = bytes([BOS_ID] * bos) + text
            ids_BL[row, : len(fed)] = np.frombuffer(fed, np.uint8)
            segment_ids_BL[row, : len(fed)] = 1
        script_ids_BL = script_ids_of_rows(ids_BL, segment_ids_BL)[0]
        route_ids_BL = route_of[script_ids_BL]
        named_BL, names_of = (
            (route_ids_BL, model.route_names) if model.num_routes > 1 else (script_ids_BL, SCRIPTS)
        )
        batch = Fed(*map(jnp.asarray, (ids_BL, segment_ids_BL, route_ids_BL)))
        stages, nats_BL = jax.device_get(run(params, batch))
        found = []
        for row, text in enumerate(texts):
            starts, in_front = as_starts(model, [(mask[row], prob[row]) for mask, prob in stages])
            found.append(
                Segmentation.from_router(
                    text,
                    starts,
                    name=names[row] if names else "",
                    prefix=in_front + bos,
                    routes=[names_of[i] for i in named_BL[row, bos : len(text) + bos]],
                    gold=gold[row] if gold else None,
                    nats=nats_BL[row, 1 : len(text) + 1] if bos else None,
                )
            )
        return found

    return segment


def segment_all(
    segment: Callable[..., list[Segmentation]], params: Any, texts: Sequence[bytes]
) -> list[Segmentation]:
    """Segment any number of texts with a `segmenter`; texts of similar length are batched."""
    waiting = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Segmentation] = {}
    while waiting:
        longest = _padded(len(texts[waiting[:ROWS][-1]]))
        most = min(ROWS, max(1, POSITIONS // longest), len(texts))
        rows, waiting = waiting[:most], waiting[most:]
        spare = [b""] * (most - len(rows))  # pads the batch, to avoid another shape
        found |= dict(zip(rows, segment(params, [*(texts[i] for i in rows), *spare])))
    return [found[i] for i in range(len(texts))]


def _padded(most: int) -> int:
    """Row length for texts of up to `most` bytes and BOS."""
    return row_length(max(64, most + 1))


def as_starts(
    model: HNetConfig, outputs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Convert (mask, probability) of each stage of one row to chunk starts; also return a prefix.

    An end at position t is a start at t + 1. A null chunk is treated as a normal chunk of one
    position before the text: each stage with alignment "end" adds one such position, which is a
    chunk of its own in every stage. The prefix is the number of added positions. The last chunk of
    such a stage may be incomplete; the next inner stage then has no position for it and starts no
    chunk there.
    """
    found, ends = [], [stage.chunking.has_null_chunk for stage in model.stages[:-1]]
    for s, (mask, prob) in enumerate(outputs):
        before, after = sum(ends[s:]) + ends[s], int(s > 0 and ends[s - 1])
        pad = partial(np.pad, pad_width=(before, after), constant_values=(1, 0))
        found.append((pad(mask), pad(prob)))
    return found, sum(ends)
