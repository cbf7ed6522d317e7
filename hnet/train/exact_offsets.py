"""After the last update: set threshold offsets so that boundary rates equal their targets.

The rates are measured on a long text. With `rate_control.fit_default` the default route's boundary
predictor is fitted first, for training text with no script of that route.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.rate_control import exact_offsets, map_offsets
from hnet.data import Corpus, train_batches
from hnet.data.pipeline import Batch
from hnet.data.row_routes import in_unknown_scripts
from hnet.nn.parameters import describe, trained, with_frozen
from hnet.train.compiled_run import CompiledRun, run_batches
from hnet.train.config import Config
from hnet.train.default_route import fit_default_route
from hnet.train.evaluate import OfEachRun

SEED = 0x5E771E  # seed of a data order that no run uses
UNKNOWN_FRAC = 0.1  # share of rows in synthetic scripts: enough positions of each route


class Logits:
    """Accumulator for `evaluate`: logits and routes of all positions of one stage, no padding."""

    def __init__(self, stage: int):
        self.stage, self.logits, self.routes = stage, [], []

    def add(self, batch: Batch, metrics: dict) -> None:
        del batch
        logit_BL, route_BL = map(np.asarray, metrics["logits_without_offset"][self.stage])
        is_padding_BL = np.isnan(logit_BL)
        self.logits.append(logit_BL[~is_padding_BL])
        self.routes.append(route_BL[~is_padding_BL])

    def exact_offsets(self, config: Config) -> np.ndarray:
        targets = config.model.stages[self.stage].chunking.target_ratios
        return exact_offsets(np.concatenate(self.logits), np.concatenate(self.routes), targets)


def set_exact_offsets(
    program: CompiledRun,
    params: Any,
    corpus: Corpus,
    configs: Sequence[Config],
    capacities: tuple[int | None, ...],
    beat: Callable[[], None] = lambda: None,
) -> Any:
    """`params` with exact offsets in every stage that holds its rate, outermost stage first.

    The input of a stage depends on the boundaries of the stages around it, so there is one pass
    over the text per stage. Predictors draw no noise, as in inference. Boundaries that
    `max_chunk_len` forces count too, and change with the offset: such a stage has three passes,
    each from the offset of the one before.
    configs: the run's, or those of all runs trained together (arrays have a leading axis of runs).
    beat: called once per batch, as a heartbeat, because this can take long.
    """
    config, model = configs[0], configs[0].model
    before, infos = params, describe(nnx.merge(program.graph, params))
    positions = config.data.batch_size * config.data.seq_len
    num_batches = min(-(-config.rate_control.offset_bytes // positions), config.train.steps)
    fits = config.rate_control.fit_default

    def text(seed: int, unknown_frac: float) -> Iterator[Batch]:
        groups = model.route_groups
        with train_batches(corpus, config.data, seed=seed, route_groups=groups) as batches:
            own = islice(batches, num_batches)
            for batch in in_unknown_scripts(own, seed, unknown_frac) if fits else own:
                beat()
                yield batch

    for s, stage in enumerate(model.stages[:-1]):
        if not (stage.chunking.hold_rate and num_batches):
            continue
        if fits and stage.chunking.num_predictors > 1:
            targets = [c.model.stages[s].chunking.target_ratios[0] for c in configs]
            made_up = text(SEED + 1, 1.0)
            params = fit_default_route(program, params, s, targets, made_up, num_batches)
        for _ in range(3 if stage.chunking.max_chunk_len else 1):
            found = OfEachRun(Logits(s) for _ in configs)
            into = found if "runs" in program.mesh.shape else found[0]
            run_batches(program, params, text(SEED, fits * UNKNOWN_FRAC), capacities, into=into)
            exact = [logits.exact_offsets(config) for logits, config in zip(found, configs)]
            params = map_offsets(partial(_set, s, exact), params)
        params = with_frozen(trained(infos, params), before)
    return params


def _set(wanted: int, exact: list[np.ndarray], stage: int, offset: jax.Array) -> jax.Array:
    """Set the offsets of stage `wanted` (of every run); where `exact` is NaN the old ones stay."""
    if stage != wanted:
        return offset
    runs = offset.reshape(-1, offset.shape[-1]).shape[0]  # the last run may be repeated as padding
    new = np.stack([*exact, *[exact[-1]] * (runs - len(exact))]).reshape(offset.shape)
    choose = jax.jit(lambda old, new: jnp.where(jnp.isnan(new), old, new))
    return jax.device_put(choose(offset, new), offset.sharding)
