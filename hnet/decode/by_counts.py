"""The forward pass on as many chunk slots as the boundaries need: nothing clipped, little unused.

The number of slots is a shape, so it must be known before the main network is compiled. The pass
is therefore divided at every predictor: one program runs the encoder and the predictor of a stage,
the host reads how many slots the fullest row needs, and the next program continues with the
smallest of a few sizes that holds them. No layer runs twice. The programs are compiled once per
shape; sizes are multiples of 16 and grow by an eighth at most from 128 on, so that short texts need
few programs and long ones have few unused slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.boundaries import Boundaries
from hnet.chunking.slots import Slots, bucket
from hnet.config import HNetConfig
from hnet.model import HNetLM, number_runs, split
from hnet.nn.context import Context
from hnet.stage import HNet, Opened, Prompts, StageCache, inner_prompts, most_slots

PER_OCTAVE = 8  # sizes of slots from one power of two to the next
LEAST_STEP = 16  # least difference of two sizes, and what all are multiples of


class Static:
    """A model without its parameters as a static argument, hashed once and not at every call."""

    def __init__(self, graph: nnx.GraphDef, config: HNetConfig, tree: Any = None):
        """tree: tree definition of parameters that are passed as a tuple of arrays (`of`)."""
        self.graph, self.config, self.tree, self._hash = graph, config, tree, hash(graph)

    @classmethod
    def of(cls, model: HNetLM) -> tuple["Static", tuple[jax.Array, ...]]:
        """(static part, parameters): a tuple of arrays, which a call flattens ten times as fast as
        nested dicts."""
        graph, params = split(model)
        leaves, tree = jax.tree.flatten(params)
        return cls(graph, model.config, tree), tuple(leaves)

    def merge(self, params: Any) -> HNetLM:
        """The model with these parameters."""
        return nnx.merge(self.graph, self.nested(params))

    def nested(self, params: Any) -> Any:
        """The parameters as nested dicts."""
        return params if self.tree is None else jax.tree.unflatten(self.tree, params)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        same = isinstance(other, Static) and self.tree == other.tree
        return same and self.graph == other.graph


class Fed(NamedTuple):
    """Inputs of a model, as in `HNetLM`."""

    input_ids_BL: jax.Array
    segment_ids_BL: jax.Array
    route_ids_BL: jax.Array | None = None
    boundaries_BL: jax.Array | None = None


class Done(NamedTuple):
    """A forward pass, inside its last program."""

    model: HNetLM
    params: Any
    fed: Fed
    context: Context
    x_BLD: jax.Array
    """output of the backbone"""
    boundaries: list[Boundaries]
    """of each stage that chunks, outermost first"""
    cache: StageCache | None
    """cache after prompts"""

    @property
    def logits_BLV(self) -> jax.Array:
        return self.model.logits(self.x_BLD, self.context)


class _Frame(NamedTuple):
    """A stage that was opened: passed from one program to the next."""

    opened: Opened
    lengths_B: jax.Array | None
    """numbers of positions of prompts"""
    slots: Slots | None = None


def forward(
    static: Static,
    params: Any,
    fed: Fed,
    then: Callable[..., Any],
    *more: Any,
    lengths_B: jax.Array | None = None,
    max_lens: tuple[int, ...] = (),
) -> Any:
    """`then(Done, *more)` of a forward pass in which no boundary is clipped.

    then: function that is compiled with the end of the pass, the same object in every call.
    lengths_B, max_lens: those of `hnet.decode.stream.prefill`, for prompts; boundaries beyond
    `max_lens` are clipped.
    """
    how = {"static": static, "max_lens": max_lens}
    frames, capacity = (), 0
    for s, stage in enumerate(static.config.stages[:-1]):
        frames, count = _open(params, fed, lengths_B, frames, capacity=capacity, **how)
        most = most_slots(stage.chunking, frames[-1].opened.h_BLD.shape[1], max_lens[s:])
        capacity = bucket(most, int(count), PER_OCTAVE, LEAST_STEP)
    return _finish(params, fed, lengths_B, frames, more, capacity=capacity, then=then, **how)


@partial(jax.jit, static_argnames=("static", "max_lens", "capacity"))
def _open(params, fed, lengths_B, frames, *, static, max_lens, capacity):
    """(frames with one more, which is the next stage, slots that its fullest row needs)."""
    model = static.merge(params)
    x_BLD, context, frames, prompts = _enter(model, fed, lengths_B, frames, capacity, max_lens)
    stage = _stages(model)[len(frames)]
    x_BLD = stage.widen(x_BLD)
    most = most_slots(stage.chunking, x_BLD.shape[1], prompts.max_lens if prompts else ())
    opened = stage.open(x_BLD, context, most, prompts=prompts)
    count = jnp.max(opened.own.num_slots_G, initial=0)
    return (*frames, _Frame(opened, prompts and prompts.lengths_B)), count


@partial(jax.jit, static_argnames=("static", "max_lens", "capacity", "then"))
def _finish(params, fed, lengths_B, frames, more, *, static, max_lens, capacity, then):
    model = static.merge(params)
    x_BLD, context, frames, prompts = _enter(model, fed, lengths_B, frames, capacity, max_lens)
    *outer, innermost = _stages(model)
    x_BLD, cache = innermost.widen(x_BLD), None
    if prompts:
        x_BLD, cache = innermost.prefill_innermost(x_BLD, context, prompts)
    else:
        x_BLD = innermost.main_network(x_BLD, context)
    for s, (stage, frame) in reversed([*enumerate(zip(outer, frames))]):
        if prompts:
            own = Prompts(frame.lengths_B, max_lens[s:])
            x_BLD, cache = stage.leave_prompts(x_BLD, frame.opened, frame.slots, own, cache)
        else:
            x_BLD, _ = stage.leave(x_BLD, frame.opened, frame.slots)
    boundaries = [frame.opened.own for frame in frames]
    context = frames[0].opened.context if frames else context
    return then(Done(model, static.nested(params), fed, context, x_BLD, boundaries, cache), *more)


def _enter(model, fed, lengths_B, frames, capacity, max_lens):
    """(input of the next stage, its context, frames, prompts): through the pool of the last one."""
    if not frames:
        segment_ids_BL = fed.segment_ids_BL if max_lens else number_runs(fed.segment_ids_BL)
        context = model.context(fed.input_ids_BL, segment_ids_BL, *fed[2:])
        prompts = Prompts(lengths_B, max_lens) if max_lens else None
        return model.embeddings(fed.input_ids_BL, context), context, frames, prompts
    (*outer, last), stage = frames, _stages(model)[len(frames) - 1]
    x_BLD, context, slots = stage.enter(last.opened, capacity)
    prompts = None
    if max_lens:
        prompts = inner_prompts(context, Prompts(last.lengths_B, max_lens[len(outer) :]))
    return x_BLD, context, (*outer, last._replace(slots=slots)), prompts


def _stages(model: HNetLM) -> list[HNet]:
    """All stages, outermost first."""
    found = [model.backbone]
    while not found[-1].is_innermost:
        found.append(found[-1].main_network)
    return found
