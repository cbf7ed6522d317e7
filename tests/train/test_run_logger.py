"""The logs of a run, line by line; profiles start and stop at the requested steps."""

import errno
import json
import math
import os
import signal
import types
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hnet.data import DataConfig, open_corpus
from hnet.errors import ConfigError
from hnet.inspect.index import SegmentationIndex
from hnet.inspect.segmentation import Segmentation
from hnet.runtime.compile_cache import Compilation
from hnet.train import live_line, trace
from hnet.train import run_logger as report
from hnet.train.compiled_run import build
from hnet.train.config import ProfileConfig, TrainConfig
from hnet.train.evaluate import Evaluation
from hnet.train.first_lines import first_lines, last_lines
from hnet.train.live_line import LiveLine
from hnet.train.metrics_file import read_metrics
from hnet.train.run_logger import RunLogger, Start
from hnet.train.trace import Trace
from tests.training import tiny_run


def row_of(step, **changes):
    """Row that the loop reports for a step of 100 bytes at 2 bits per byte."""
    metrics = {
        "nats": 200 * math.log(2), "bytes": 100, "skipped_in_a_row": 0,
        "stage0/chunks": 30, "stage0/boundary_rate": 0.3, "stage0/target_rate": 0.3,
        "stage0/overflow_frac": 0.0, "stage0/prob_hist": np.arange(20),
    }  # fmt: skip
    arrays = {name: np.asarray(value) for name, value in (metrics | changes).items()}
    waited = {"input/wait_seconds": 0.5 * step}
    waited |= {f"bytes_seen//data/{name}/*.txt": 50 * step for name in "ab"}
    return {"step": step, "bytes_seen": 100 * step, **waited, "metrics": arrays}


def test_a_run_logs_its_first_step_and_every_tenth(tmp_path, monkeypatch, capsys):
    config = tiny_run(tmp_path, train=TrainConfig(steps=30, log_every=10))
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(report, "time", clock)
    now = 5.0
    with RunLogger(config, open_corpus(config.data), Start()) as told:
        told.utilization = types.SimpleNamespace(peak=1000.0, flops=lambda n_S: 2 * sum(n_S))
        for step in range(1, 21):
            now += 4.0
            if step == 12:  # a new program: 30 s that do not count as training
                now += 30.0
                told.line.compilations.entries.append(Compilation("step", False, 30.0))
            clipped = {"stage0/overflow_frac": 0.125} if step == 7 else {}
            skipped = {"skipped_in_a_row": 1} if step == 9 else {}
            row = row_of(step, **clipped, **skipped) | (
                {"non_finite": "loss/ce"} if step == 9 else {}
            )
            assert told.step(row) == []
    first, *others = read_metrics(tmp_path)
    assert [row["step"] for row in (first, *others)] == [1, 9, 10, 20]
    assert others[0]["non_finite"] == "loss/ce" and "non_finite" not in others[1]
    assert first["mfu"] == others[2]["mfu"] == 60 / 4 / 1000
    assert others[0]["mfu"] == pytest.approx((60 - 7.5 / 8) / 4 / 1000)
    assert all(row["train/bpb"] == pytest.approx(2) for row in (first, *others))
    assert first["bytes_per_sec"] == 100 / 4 and first["input/stall_frac"] == 0.5 / 4
    for row in others:
        assert row["bytes_per_sec"] == 100 / 4 and row["input/stall_frac"] == 0.5 / 4
    says = capsys.readouterr().out
    assert "step 7: overflow: 12.50% of stage 0's chunks were clipped" in says
    assert "step 9: update skipped, loss or gradient is not finite, first in loss/ce" in says
    assert says.count("overflow") == says.count("skipped") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    assert [e.step for e in events.Scalars("throughput/mfu")] == [1, 9, 10, 20]
    assert [e.value for e in events.Scalars("throughput/bytes_seen/b/*.txt")][2:] == [500, 1000]
    assert not any("//" in tag or "data" in tag for tag in events.Tags()["scalars"])
    histograms = events.Histograms("stage0/prob_hist")
    assert [e.step for e in histograms] == [1, 9, 10, 20]
    assert histograms[0].histogram_value.num == sum(range(20))


def test_rates_per_second_are_of_the_bytes_since_the_start(tmp_path, monkeypatch):
    """Both for a run that resumes and after a rollback, whatever was logged before."""
    config = tiny_run(tmp_path, train=TrainConfig(steps=90, log_every=10))
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(report, "time", clock)
    now = 0.0
    with RunLogger(config, open_corpus(config.data), Start(34, 3400)) as told:
        for step in range(35, 51):
            now += 2.0
            told.step(row_of(step))
        now += 7.0
        told.rolled_back(Start(34, 3400), "it broke")
        waited = 0.0
        for step in range(35, 61):
            now += 4.0
            waited += 1.0
            told.step(row_of(step) | {"input/wait_seconds": waited})
    table = read_metrics(tmp_path)
    assert [row["step"] for row in table] == [40, 50, 60]
    assert [row["bytes_per_sec"] for row in table] == [100 / 4] * 3
    assert [row["input/stall_frac"] for row in table] == [1 / 4] * 3


def test_every_log_goes_back_with_the_run(tmp_path):
    """For a run killed before its first checkpoint, one that resumes and one that rolls back."""
    config = tiny_run(tmp_path, train=TrainConfig(steps=90, log_every=1))
    corpus, folder = open_corpus(config.data), str(tmp_path / "tensorboard")
    seg = Segmentation(b"ab", "a")

    def log(told, first, last):
        for step in range(first, last + 1):
            told.step(row_of(step))
            if step % 2 == 0:
                told.writer.write_segmentations(step, [seg])

    def logged():
        events = EventAccumulator(folder, {"scalars": 0}).Reload()
        index = SegmentationIndex(f"{folder}/boundaries")
        index.refresh()
        steps = [row["step"] for row in read_metrics(tmp_path)]
        assert [e.step for e in events.Scalars("train/bpb")] == steps
        assert list(index.steps) == [step for step in steps if step % 2 == 0]
        return steps

    with RunLogger(config, corpus, Start()) as told:
        log(told, 1, 7)
    with RunLogger(config, corpus, Start()) as told:
        log(told, 1, 3)
    assert logged() == [1, 2, 3]
    with RunLogger(config, corpus, Start(2, 200)) as told:
        log(told, 3, 6)
        told.rolled_back(Start(4, 400), "it broke")
        log(told, 5, 5)
    assert logged() == [1, 2, 3, 4, 5]


def refuses(params, texts, names, gold):
    raise ConfigError("stages.0.probs must lie between 0 and 1")


def test_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    config = tiny_run(tmp_path, train=TrainConfig(steps=30, log_every=10))
    with RunLogger(config, open_corpus(config.data), Start()) as told:
        row = row_of(1, nats=math.nan, grad_norm=math.inf)
        evaluation = Evaluation(chunks_by_stage=(3.0,))  # its bits per byte are NaN
        told.evaluated(1, evaluation, row, refuses, None)
        told.step(row)
    said = capsys.readouterr().out
    assert "step 1: the texts are not drawn: stages.0.probs must lie between" in said
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["train/bpb"] is None and row["grad_norm"] is None and row["eval/bpb"] is None
    assert row["stage0/boundary_rate"] == 0.3


def test_a_run_that_has_ended_writes_nothing(tmp_path):
    config = tiny_run(tmp_path, train=TrainConfig(steps=30))
    with RunLogger(config, open_corpus(config.data), Start(30, 3000, 30)) as told:
        told.save()
        told.say("nothing to do")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def traced(monkeypatch):
    """Recorded calls of the profiler (the real one raises for a second start or stop)."""
    calls = []
    monkeypatch.setattr(trace, "_loads_libtpu_in_vain", lambda: False)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def profiled(tracing, ran, traced, signals=()):
    """The steps that are in a profile. signals: steps during which SIGUSR1 arrives."""
    found = []
    for done in ran:
        with tracing.step(done):
            found += [done] if traced[-1:] == ["start"] else []
            if done in signals:
                os.kill(os.getpid(), signal.SIGUSR1)
    tracing.end()
    return found


@pytest.mark.parametrize(
    ("steps", "ran", "expected"),
    [
        ("2:5", range(9), [2, 3, 4]),
        ("0:1", range(3), [0]),
        ("2:5", range(3, 9), [3, 4]),  # resumed within the range
        ("2:5", range(5, 9), []),  # resumed after the range
        ("2:5", range(4), [2, 3]),  # ended within the range
        ("", range(9), []),
    ],
)
def test_the_steps_that_are_traced(traced, tmp_path, steps, ran, expected):
    assert profiled(Trace(ProfileConfig(steps), tmp_path), ran, traced) == expected
    assert traced == (["start", "stop"] if expected else [])


def test_a_signal_profiles_the_next_steps_and_a_second_one_meanwhile_does_nothing(
    traced, tmp_path, monkeypatch
):
    before, said = signal.getsignal(signal.SIGUSR1), []
    tracing = Trace(ProfileConfig("12:14", signal_steps=3), tmp_path, said.append)
    tracing.listen()
    assert profiled(tracing, range(20), traced, (1, 3, 4, 7)) == [2, 3, 4, 8, 9, 10, 12, 13]
    assert traced == ["start", "stop"] * 3 and signal.getsignal(signal.SIGUSR1) == before
    assert said[:2] == [
        f"step 2: the next 3 are profiled, into {tmp_path}", f"profile written: {tmp_path}",
    ]  # fmt: skip
    monkeypatch.setattr(trace, "_loads_libtpu_in_vain", lambda: True)
    tracing = Trace(ProfileConfig(), tmp_path, said.append)
    tracing.listen()
    assert profiled(tracing, range(9), ["stop"], (3,)) == [] and "libtpu" in said[-1]


@pytest.mark.parametrize("name", ["start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_written_does_not_end_the_run(traced, tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jax.profiler, name, full)
    said = []
    profiled(Trace(ProfileConfig("2:4"), tmp_path, said.append), range(6), traced)
    assert said[1:] == [
        f"no profile in {tmp_path} (OSError: [Errno 28] No space left on device): the run goes on "
        "without it"
    ]


@pytest.mark.parametrize(
    ("platforms", "is_installed", "backend", "expected"),
    [
        (None, True, "cpu", True),
        ("cpu", True, "cpu", False),
        (None, False, "cpu", False),
        (None, True, "tpu", False),
    ],
)
def test_a_profile_beside_an_idle_libtpu_is_refused(
    monkeypatch, tmp_path, platforms, is_installed, backend, expected
):
    """The profiler of an idle libtpu would end the process with a segmentation fault."""
    config = types.SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(trace.jax, "config", config)
    monkeypatch.setattr(trace.jax, "default_backend", lambda: backend)
    found = object() if is_installed else None
    monkeypatch.setattr(trace.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match="JAX_PLATFORMS") if expected else nullcontext():
        Trace(ProfileConfig("2:5"), tmp_path)
    Trace(ProfileConfig(), tmp_path)


@pytest.mark.parametrize("steps", ["10", "5:5", "a:b", "-1:4"])
def test_other_windows_are_refused(steps):
    with pytest.raises(ConfigError, match="FIRST:LAST"):
        ProfileConfig(steps)


def test_the_time_left_counts_neither_the_first_step_nor_compilation(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(live_line, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    line = LiveLine(10, 2, seconds=0.0)
    row = {"train/bpb": 2.0, "bytes_per_sec": 1.0}

    def step_at(seconds, step):
        now[0] = seconds
        line.first_step(step)
        line.show(row | {"step": step})

    step_at(150.0, 3)  # 50 s with compilation
    step_at(154.0, 5)  # 2 s per step
    line.compilations.entries.append(Compilation("evaluation", False, 30.0))
    step_at(190.0, 8)  # 30 of 36 s are compilation
    line.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "compiled in 50 s" and said[1].startswith("step 3/10")
    assert "left" not in said[1]
    assert said[2].endswith("  0:10 left") and said[3].endswith("  0:04 left")
    assert len(said) == 4


def test_first_lines_say_what_the_run_is_and_last_ones_what_can_be_done(tmp_path):
    config = tiny_run(str(tmp_path / "a b"), train=TrainConfig(steps=24))
    program, corpus = build(config), open_corpus(config.data)
    found = dict(line.split(maxsplit=1) for line in first_lines(config, corpus, program, 7)[:6])
    leaves = jax.tree.leaves(program.init().params)
    assert found["workdir"] == f"{tmp_path}/a b (resuming at step 7)"
    assert found["model"].startswith(f"{sum(leaf.size for leaf in leaves):,} parameters, [")
    assert found["devices"] == "1 x cpu; peak FLOP/s unknown: no throughput/mfu"
    total = corpus.train.num_bytes, corpus.heldout.num_bytes
    assert found["data"] == f"{total[0]:,} bytes in 1 file, {total[1]:,} bytes held out"
    assert found["look"] == f"tensorboard --logdir {tmp_path}"
    assert f"--checkpoint '{tmp_path}/a b'" in last_lines(config)[2]
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text" * 9)
    two = open_corpus(DataConfig((f"{tmp_path}/*.txt",), seq_len=9))
    assert "bytes in 2 files, " in first_lines(config, two, program, 7)[3]
