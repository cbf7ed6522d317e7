"""How far runs of one program are from the same runs trained separately, and why.

    python -m experiments.benchmarks.rounding [--rates 8] [--seeds 2] [--name tiny]

A step is compared in two ways. From the same state: the gradient of a run in the joint program
against that of the separate run, both from the state of the separate run. From the same start: both
sides train independently from the same initial state, and after each step the next batch is
segmented with the parameters of both. The two programs sum in a different order, so gradients
differ by rounding. Adam divides a gradient by its own size, so parameters whose gradient is hardly
larger than rounding drift apart, until a boundary with p near 0.5 changes on one side. The control
is the separate run repeated from parameters that are one unit in the last place larger: the effect
of rounding by itself. About two minutes on one CPU core.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.sweep import SweepBenchmark, learning_rates
from hnet.command_line import parse, run
from hnet.data import open_corpus
from hnet.files import json_text
from hnet.train import parallel_program, parallel_runs
from hnet.train.compiled_run import CompiledRun, build, put_batch, traced_numbers
from hnet.train.config import Config
from hnet.train.named import run_config


@dataclass
class Run:
    """Differences of one run between both programs, one number per step."""

    gradient: list[float]
    """relative norm of the gradient difference, from the same state"""
    loss: list[float]
    """relative difference of loss, from the same start"""
    turned: list[int]
    """number of boundaries of the next batch that only one side has"""
    nearest: list[float]
    """largest distance of p from 0.5 where a boundary changed; 0 if none did"""
    control: list[float]
    """difference of loss between the separate run and the control"""


def main() -> int:
    options = parse(SweepBenchmark)
    base = run_config([options.name])
    configs = [
        replace(base, seed=seed, optim=replace(base.optim, learning_rate=rate))
        for rate in learning_rates(options.rates)
        for seed in range(options.seeds)
    ]
    ways = compare(configs)
    firsts = [next((t for t, n in enumerate(way.turned) if n), None) for way in ways]
    apart = [way.loss[: t + 1] if t is not None else way.loss for way, t in zip(ways, firsts)]
    after = [way.loss[t + 1 :] for way, t in zip(ways, firsts) if t is not None]
    print(json_text({
        "runs": len(ways),
        "steps": base.train.steps,
        "gradient from the same state, off by at most": _short(w.gradient for w in ways),
        "loss while all boundaries are equal, off by at most": _short(apart),
        "step after which a boundary turned first, by run": firsts,
        "p of that boundary, off 0.5 by at most": _short(
            [[w.nearest[t]] for w, t in zip(ways, firsts) if t is not None]
        ),
        "loss after that, off by at most": _short(after),
        "loss by step, off by at most": [_short([d]) for d in zip(*(w.loss for w in ways))],
        "the same of a separate run that starts one last place away": [
            _short([d]) for d in zip(*(w.control for w in ways))
        ],
    }, indent=1))  # fmt: skip
    return 0


def _short(columns) -> float:
    return float(f"{max((max(column, default=0.0) for column in columns), default=0.0):.1e}")


def compare(configs: list[Config], devices: list | None = None, **build_options: Any) -> list[Run]:
    """Train the runs in one program and separately, with all chunk slots."""
    devices = jax.devices() if devices is None else devices
    together = parallel_program.build(configs, devices=devices, **build_options)
    by_seed = {c.seed: build(c, devices=devices, **build_options) for c in configs}
    separate = by_seed[configs[0].seed]  # the others differ only in traced values
    hparams = [traced_numbers(config) for config in configs]
    cut = jax.jit(partial(_cut, graph=separate.graph))
    corpus, ways = open_corpus(configs[0].data), [Run([], [], [], [], []) for _ in configs]
    many = together.init()
    one = [by_seed[config.seed].init() for config in configs]
    near = [by_seed[config.seed].init() for config in configs]
    up = jax.jit(partial(jax.tree.map, lambda x: jnp.nextafter(x, jnp.full_like(x, jnp.inf))))
    near = [state._replace(params=up(state.params)) for state in near]
    with parallel_runs.open_batches(configs, corpus, 0) as batches:
        batch = next(batches)
        for _ in range(configs[0].train.steps):
            old = [_moment(state) for state in one]
            forced, _ = _step(together, _stacked(one, together), batch, together.hparams)
            many, many_metrics = _step(together, many, batch, together.hparams)
            forced_moment, many_params = _moment(forced), jax.device_get(many.params)
            following = next(batches)
            for r, way in enumerate(ways):
                fed, capacities = put_batch(batch[r], separate.mesh), separate.ladder.capacities
                one[r], metrics = separate.step(one[r], fed, hparams[r], capacities=capacities)
                new = _moment(one[r])
                scale = np.linalg.norm(new - configs[r].optim.b1 * old[r])
                way.gradient.append(float(np.linalg.norm(forced_moment[r] - new) / scale))
                loss = float(metrics["loss/total"])
                way.loss.append(abs(float(many_metrics["loss/total"][r]) - loss) / loss)
                near[r], metrics = separate.step(near[r], fed, hparams[r], capacities=capacities)
                way.control.append(abs(float(metrics["loss/total"]) - loss) / loss)
                ids = [jnp.asarray(following[r][name]) for name in ("input_ids", "segment_ids")]
                p, mine = cut(jax.device_get(one[r].params), *ids)
                _, theirs = cut(jax.tree.map(lambda x, r=r: x[r], many_params), *ids)
                turned = np.asarray(mine != theirs)
                way.turned.append(int(turned.sum()))
                way.nearest.append(float(np.abs(np.asarray(p)[turned] - 0.5).max(initial=0.0)))
            batch = following
    return ways


def _cut(params: Any, input_ids_BL: jax.Array, segment_ids_BL: jax.Array, *, graph: nnx.GraphDef):
    """p and boundaries of all stages, each flattened into one row."""
    _, routes = nnx.merge(graph, params)(input_ids_BL, segment_ids_BL)
    flat = lambda arrays: jnp.concatenate([a.ravel() for a in arrays])
    return flat([r.boundary_prob_BL for r in routes]), flat([r.boundary_mask_BL for r in routes])


def _step(program: CompiledRun, state: Any, batch: list, hparams: Any):
    fed = parallel_program.put_batches(batch, program.mesh)
    return program.step(state, fed, hparams, capacities=program.ladder.capacities)


def _stacked(states: list, program: CompiledRun) -> Any:
    """States of single runs as the state of the joint program, which repeats the last run."""
    states = [*states, *[states[-1]] * (-len(states) % program.mesh.shape["runs"])]
    return jax.tree.map(
        lambda sharding, *leaves: jax.device_put(jnp.stack(leaves), sharding),
        program.shardings, *states,
    )  # fmt: skip


def _moment(state: Any) -> np.ndarray:
    """Adam's first moment, flattened; one row per run if there are several. After a step from equal
    states these differ by the difference of the gradients times 1 - b1."""
    (mean,) = (part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam)
               if _is_adam(part))  # fmt: skip
    shape = (*state.step.shape, -1)
    flat = [np.reshape(leaf, shape) for leaf in jax.tree.leaves(jax.device_get(mean))]
    return np.concatenate(flat, axis=-1)


def _is_adam(part: Any) -> bool:
    return hasattr(part, "mu")


if __name__ == "__main__":
    run(main, trains=True)
