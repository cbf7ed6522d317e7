"""The input pipeline measured against what a run has logged."""

import json

import numpy as np
import pytest

from experiments.benchmarks.input import InputBenchmark, consumed, delivered, measure
from hnet.errors import ConfigError
from hnet.train.workdir import claim_workdir
from tests.training import tiny_run

LOG = [
    {"step": 1, "bytes_per_sec": 1.0, "input/stall_frac": 0.9},  # the start
    {"step": 11, "bytes_per_sec": 50.0, "input/stall_frac": 0.04},
    {"step": 41, "bytes_per_sec": 70.0, "input/stall_frac": 0.0},
    {"step": 51, "bytes_per_sec": 40.0, "input/stall_frac": 0.01},
]


@pytest.fixture
def workdir(tmp_path):
    claim_workdir(tiny_run(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    return tmp_path


def test_what_the_run_consumed_is_read_from_its_log(workdir):
    rate, stall = consumed(str(workdir))
    assert rate == 50.0
    assert stall == pytest.approx((10 * 0.04 + 30 * 0.0 + 10 * 0.01) / 50)


def test_the_pipeline_without_a_model_counts_source_bytes(workdir, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    batch = {"loss_mask": np.array([[False, True, True], [True, False, True]])}
    assert delivered(iter([batch] * 9), 3) == 2 * 4 / 3


def test_ratio_of_both(workdir):
    found = measure(InputBenchmark(str(workdir), seconds=0.01, repeats=3))
    assert found["run_bytes_per_sec"] == 50.0
    assert found["ratio"] == found["pipeline_bytes_per_sec"] / 50.0 > 1


def test_a_run_without_a_log_is_one_line(workdir):
    (workdir / "metrics.jsonl").write_text(json.dumps(LOG[0]) + "\n")
    with pytest.raises(ConfigError, match="fewer than two lines: train longer"):
        measure(InputBenchmark(str(workdir)))
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="metrics.jsonl' cannot be read .*: train first"):
        measure(InputBenchmark(str(workdir)))
