"""Where a model cuts given texts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import BOS_ID, HNetConfig
from hnet.data.scripts import SCRIPTS, route_table, script_ids_of_rows
from hnet.inspect.segmentation import Segmentation
from hnet.loss import next_byte_nll

ROWS = 32  # texts cut in one go
POSITIONS = ROWS * 1024  # of them, at most; bounds the memory of logits


def route_texts(params: Any, input_ids_BL, segment_ids_BL, route_ids_BL, *, graph: nnx.GraphDef):
    """(boundary mask, boundary probability) of each stage, outermost first; nats of each byte."""
    model = nnx.merge(graph, params)
    logits, records = model(input_ids_BL, segment_ids_BL, route_ids_BL=route_ids_BL)
    stages = [(r.boundary_mask_BL, r.boundary_prob_BL) for r in records]
    return stages, next_byte_nll(logits, input_ids_BL)


def segmenter(
    graph: nnx.GraphDef, model: HNetConfig, out_shardings: Any = None
) -> Callable[..., list[Segmentation]]:
    """A function (params, texts, names, gold) -> segmentations that compiles once a shape.

    Each text stands alone behind a BOS. Routes are named for each byte: those of the model, or the
    scripts if it tells none apart.
    """
    run = jax.jit(partial(route_texts, graph=graph), out_shardings=out_shardings)
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
            ids_BL[row, : len(text) + 1] = [BOS_ID, *text]
            segment_ids_BL[row, : len(text) + 1] = 1
        script_ids_BL = script_ids_of_rows(ids_BL, segment_ids_BL)[0]
        route_ids_BL = route_of[script_ids_BL]
        named_BL, names_of = (
            (route_ids_BL, model.route_names) if model.num_routes > 1 else (script_ids_BL, SCRIPTS)
        )
        fed = map(jnp.asarray, (ids_BL, segment_ids_BL, route_ids_BL))
        stages, nats_BL = jax.device_get(run(params, *fed))
        found = []
        for row, text in enumerate(texts):
            starts, in_front = as_starts(model, [(mask[row], prob[row]) for mask, prob in stages])
            found.append(
                Segmentation.from_router(
                    text,
                    starts,
                    name=names[row] if names else "",
                    prefix=in_front + 1,
                    routes=[names_of[i] for i in named_BL[row, 1 : len(text) + 1]],
                    gold=gold[row] if gold else None,
                    nats=nats_BL[row, 1 : len(text) + 1],
                )
            )
        return found

    return segment


def segment_all(
    segment: Callable[..., list[Segmentation]], params: Any, texts: Sequence[bytes]
) -> list[Segmentation]:
    """Any number of texts by a `segmenter`; those of similar length run together."""
    waiting = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Segmentation] = {}
    while waiting:
        longest = _padded(len(texts[waiting[:ROWS][-1]]))
        most = min(ROWS, max(1, POSITIONS // longest), len(texts))
        rows, waiting = waiting[:most], waiting[most:]
        spare = [b""] * (most - len(rows))  # so that no other shape is compiled
        found |= dict(zip(rows, segment(params, [*(texts[i] for i in rows), *spare])))
    return [found[i] for i in range(len(texts))]


def _padded(most: int) -> int:
    """Positions of a row for texts of up to `most` bytes: few lengths, so few are compiled."""
    return max(64, 1 << most.bit_length())


def as_starts(
    model: HNetConfig, outputs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """(mask, probability) of each stage of one row as those of chunk starts, and a prefix.

    An end at a position is a start behind it. A null slot is a chunk like others if something is
    before the text that it can hold: so each stage with alignment end puts one position in front,
    which is a chunk of its own in every stage. The last chunk of such a stage may be unfinished;
    then the stage inside has not seen it, and starts nothing there.
    """
    found, ends = [], [stage.chunking.has_null for stage in model.stages[:-1]]
    for s, (mask, prob) in enumerate(outputs):
        in_front, behind = sum(ends[s:]) + ends[s], int(s > 0 and ends[s - 1])
        pad = partial(np.pad, pad_width=(in_front, behind), constant_values=(1, 0))
        found.append((pad(mask), pad(prob)))
    return found, sum(ends)
