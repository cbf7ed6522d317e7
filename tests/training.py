"""A run small enough to train in a test, and helpers to start it."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import pytest

from hnet.config import ChunkingConfig, ComputeConfig, HNetConfig, SSMConfig, StageConfig
from hnet.data import DataConfig
from hnet.decode.segment import segmenter
from hnet.runtime.stop_request import StopRequest
from hnet.train import compiled_run, loop
from hnet.train.compiled_run import CompiledRun, traced_numbers, untraced
from hnet.train.compiled_run import build as build_program
from hnet.train.config import CheckpointConfig, Config, EvalConfig, OptimConfig, TrainConfig
from hnet.train.session import Outcome
from hnet.train.sharding import replicated
from tests.networks import QUICK

build = partial(build_program, compiler_options=QUICK)
_programs: dict[str, CompiledRun] = {}
_seeds: dict[str, int] = {}


def build_once(config: Config, devices=None, change=None) -> CompiledRun:
    """`build`, once per process for configurations of the same program."""
    if change:
        return build(config, devices=devices, change=change)
    mesh = compiled_run.make_mesh(config.mesh, devices)
    read, data, trained = untraced(config), config.data, config.train
    key = repr((
        mesh.shape, [device.id for device in mesh.devices.flat], config.init,
        read.model, read.optim, len(config.rate_control.start_ratios),
        data.batch_size, data.seq_len, data.tokenizer, len(data.files),
        trained.accumulate, trained.rows_sharing_slots, trained.log_norms, trained.spike_window,
        read.train.spike_deviations,
    ))  # fmt: skip
    if key not in _programs:
        _programs[key] = build(config, devices=devices)
        _seeds[key] = config.seed
    compiled_run.check(config, mesh)
    program = _programs[key]
    if config.seed != _seeds[key]:
        program = replace(program, init=build(config, devices=devices).init)
    numbers = traced_numbers(config)
    return replace(program, hparams=jax.device_put(numbers, replicated(program.mesh)))


@cache
def segmenter_once(*args, **options):
    return segmenter(*args, **options)


TINY = HNetConfig(
    (
        StageConfig(("m1", "m1"), 16, num_heads=2, rotary_emb_dim=4, chunking=ChunkingConfig(3.0)),
        StageConfig(("T1",), 24, 32, num_heads=2, rotary_emb_dim=4),
    ),
    ssm=SSMConfig(d_state=5, head_dim=8),
    compute=ComputeConfig(ssd_block_len=16),
)
ATTENTION = replace(  # compiles in two thirds of the time
    TINY, stages=(replace(TINY.stages[0], arch_layout=("t1", "t1")), TINY.stages[1])
)


def tiny_run(workdir: Path, **changes) -> Config:
    """Eight updates of 8 rows of 32 bytes of synthetic text; `changes` replace whole sections."""
    base = Config(
        model=ATTENTION,
        workdir=str(workdir),
        data=DataConfig(files=("synthetic:latin",), batch_size=8, seq_len=32, eval_max_bytes=600),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(steps=8, log_every=1),
        eval=EvalConfig(every=4, probe_bytes=20),
        checkpoint=CheckpointConfig(every=4),
    )
    return replace(base, **changes)


def run(config: Config, stop=None, devices=None) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", partial(build_once, devices=devices))
        patch.setattr(loop, "segmenter", segmenter_once)
        if stop:
            return loop.train(config, stop)
        with StopRequest() as stop:
            return loop.train(config, stop)


def rows(config: Config) -> list[dict]:
    """metrics.jsonl without values that depend on time or folder."""
    lines = (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()
    timed = ("bytes_per_sec", "input/stall_frac")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
