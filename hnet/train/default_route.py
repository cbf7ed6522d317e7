"""After the last update: fit the default route's boundary predictor on synthetic scripts.

This is for training text in which no script belongs to the default route. Lead bytes of an unseen
script still have their random initial embeddings, and every second or third byte is a lead byte.
The predictor's output there is arbitrary: with one threshold, such scripts had 2 to 10 bytes per
chunk. So the default route's predictor is trained to reach its target rate in any script: each row
of text is rewritten in its own synthetic script, and the loss is the rate error of every row.
All other parameters stay fixed, so results on the other routes do not change.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hnet.chunking.rate_control import LIMIT, map_offsets
from hnet.chunking.rates import row_rate_error
from hnet.data.pipeline import Batch
from hnet.train.compiled_run import CompiledRun, on_mesh, put_whole_batch
from hnet.train.sharding import replicated

LEARNING_RATE = 1e-2  # Adam's initial learning rate; it decays linearly to 0


def fit_default_route(
    program: CompiledRun,
    params: Any,
    stage: int,
    target_ratios: Sequence[float],
    batches: Iterable[Batch],
    num_batches: int,
) -> Any:
    """`params` with a stage's predictor of the default route fitted to batches of this route.

    A threshold is learned with it and becomes the offset. target_ratios: N of this route in the
    run, or one per run if several runs are trained together (arrays have a leading axis of runs).
    """
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, num_batches)
    optimizer = optax.adam(schedule)
    step = partial(_step, graph=program.graph, stage=stage, optimizer=optimizer)
    take, put, start = partial(_take, stage=stage), partial(_put, stage=stage), optimizer.init
    N = jnp.float32(target_ratios[0])
    if "runs" in program.mesh.shape:
        runs = jax.tree.leaves(params)[0].shape[0]  # the last run may be repeated as padding
        N = jnp.asarray((*target_ratios, *target_ratios[-1:] * (runs - len(target_ratios))))
        take, put, start = map(jax.vmap, (take, put, start))
        step = jax.vmap(step, in_axes=(0, 0, 0, None, 0))
    else:
        step = on_mesh(step, program.mesh)
    jit = partial(jax.jit, out_shardings=replicated(program.mesh))
    fitted = jit(take)(params)
    moments, step = jit(start)(fitted), jit(step)
    for batch in batches:
        fitted, moments = step(fitted, moments, params, put_whole_batch(batch, program.mesh), N)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.device_put(jax.jit(put)(params, fitted), shardings)


def _step(
    fitted: dict[str, jax.Array],
    moments: optax.OptState,
    params: Any,
    batch: Batch,
    target_ratio: jax.Array,
    *,
    graph: nnx.GraphDef,
    stage: int,
    optimizer: optax.GradientTransformation,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """One update from one batch; layers after this predictor are not computed (dead code)."""

    def error(fitted):
        free = fitted | {"threshold": jnp.zeros_like(fitted["threshold"])}  # it acts on p, below
        model = nnx.merge(graph, _put(params, free, stage=stage))
        ids = (batch[name] for name in ("input_ids", "segment_ids"))
        _, routes = model(*ids, route_ids_BL=batch["route_ids"])
        return row_rate_error(routes[stage], target_ratio, fitted["threshold"])

    grads = jax.grad(error)(fitted)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, moments = optimizer.update(grads, moments)
    return optax.apply_updates(fitted, updates), moments


def _take(params: Any, stage: int) -> dict[str, jax.Array]:
    """Parameters of a stage's predictor of the default route by path, and a threshold of 0."""
    found = {"threshold": jnp.zeros((), jnp.float32)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [jax.tree_util.keystr((part,), simple=True) for part in path]
        if "routing_module" in names and names.count("main_network") == stage:
            found[jax.tree_util.keystr(path)] = leaf[0]
    return found


def _put(params: Any, fitted: dict[str, jax.Array], stage: int) -> Any:
    """`params` with the fitted values put back and the threshold as this route's offset."""

    def replaced(path, leaf):
        own = fitted.get(jax.tree_util.keystr(path))
        return leaf if own is None else leaf.at[0].set(own)

    def offset(s, offset_R):
        own = jnp.clip(-fitted["threshold"], -LIMIT, LIMIT)
        return offset_R.at[0].set(own) if s == stage else offset_R

    return map_offsets(offset, jax.tree_util.tree_map_with_path(replaced, params))
