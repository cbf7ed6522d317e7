"""What input, metrics, log and files cost: `pretrain` alternating with its bare step."""

import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import jax

from experiments.benchmarks.step import random_batch
from hnet.runtime.stop_request import StopRequest
from hnet.train import loop
from hnet.train.compiled_run import build, put_batch
from hnet.train.config import Config
from hnet.train.observer import Observer


class Paced(Observer):
    """Times the steps of a run, alternating with bare steps.

    Once the number of slots is steady, it interrupts the run after every `turn` steps for as many
    bare steps: the same program on a separate state, without input, metrics, log or files.
    """

    def __init__(self, config: Config, *, warmup: int, turn: int):
        self.config, self.warmup, self.turn = config, warmup, turn
        self.bare, self.seconds = None, {"run": [], "bare": []}
        self.steps, self.capacities = [], None

    def logged(self, row: dict[str, Any], seconds: float) -> None:
        capacities = tuple(row[f"stage{s}/capacity"] for s in range(self.config.model.num_chunked))
        self.steps.append(time.perf_counter())
        if row["step"] <= self.warmup or capacities != self.capacities:
            self.capacities, self.steps = capacities, []
        elif len(self.steps) > self.turn + 1:  # the first began before the run resumed
            self.seconds["run"].append((self.steps[-1] - self.steps[1]) / (len(self.steps) - 2))
            self._take_turn()
            self.steps = []

    def _take_turn(self) -> None:
        if not self.bare or self.bare[0] != self.capacities:
            program = build(self.config)
            state, batch = program.init(), put_batch(random_batch(self.config), program.mesh)
            lowered = program.step.lower(state, batch, program.hparams, capacities=self.capacities)
            self.bare = self.capacities, lowered.compile(), batch, program.hparams, state
        _, step, batch, hparams, state = self.bare
        seconds = []
        for repeat in range(self.turn + 1):  # the first waits for the step of the run in flight
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, hparams))
            seconds += [time.perf_counter() - began] * (repeat > 0)
        self.bare = *self.bare[:-1], state
        self.seconds["bare"].append(statistics.fmean(seconds))


def measure_pretrain(
    config: Config, turns: int, warmup: int = 100, turn: int = 10
) -> dict[str, float]:
    """Bytes per second of `pretrain` with input, logging and metrics, relative to the bare step."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            workdir=folder,
            train=replace(config.train, steps=warmup + turns * (turn + 2) + 1),
            eval=replace(config.eval, every=0, max_bytes=1024),
            checkpoint=replace(config.checkpoint, every=0),
        )
        paced = Paced(config, warmup=warmup, turn=turn)
        with StopRequest() as stop:
            loop.train(config, stop, paced)
    seconds = paced.seconds
    if not seconds["bare"]:
        raise RuntimeError(f"the chunk slots were not steady within {config.train.steps} steps")
    ratios = [bare / run for run, bare in zip(seconds["run"], seconds["bare"])]
    per_batch = config.data.batch_size * config.data.seq_len
    return {
        "bytes_per_sec": per_batch / statistics.median(seconds["run"]),
        "bare_step": per_batch / statistics.median(seconds["bare"]),
        "over_bare_step": statistics.median(ratios),
        "lowest_turn": min(ratios),
        "highest_turn": max(ratios),
    }
