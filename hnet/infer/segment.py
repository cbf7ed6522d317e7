"""Where a model cuts given texts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import BOS_ID
from hnet.inspect.segmentation import Segmentation


def route_texts(params: Any, input_ids_BL, segment_ids_BL, *, graph: nnx.GraphDef):
    """(boundary mask, boundary probability) of each stage, outermost first."""
    _, routes = nnx.merge(graph, params)(input_ids_BL, segment_ids_BL)
    return [(r.boundary_mask_BL, r.boundary_prob_BL) for r in routes]


def segmenter(graph: nnx.GraphDef, out_shardings: Any = None) -> Callable[..., list[Segmentation]]:
    """A function (params, texts, names, gold) -> segmentations that compiles once a shape."""
    run = jax.jit(partial(route_texts, graph=graph), out_shardings=out_shardings)

    def segment(
        params: Any,
        texts: Sequence[bytes],
        names: Sequence[str] = (),
        gold: Sequence[dict | None] = (),
    ) -> list[Segmentation]:
        longest = max((len(t) for t in texts), default=0) + 1
        length = max(64, 1 << (longest - 1).bit_length())
        ids_BL = np.zeros((len(texts), length), np.int32)
        segment_ids_BL = np.zeros_like(ids_BL)
        for row, text in enumerate(texts):
            ids_BL[row, : len(text) + 1] = [BOS_ID, *text]
            segment_ids_BL[row, : len(text) + 1] = 1
        stages = jax.device_get(run(params, jnp.asarray(ids_BL), jnp.asarray(segment_ids_BL)))
        return [
            Segmentation.from_router(
                text,
                [(mask[row], prob[row]) for mask, prob in stages],
                name=names[row] if names else "",
                prefix=1,
                gold=gold[row] if gold else None,
            )
            for row, text in enumerate(texts)
        ]

    return segment
