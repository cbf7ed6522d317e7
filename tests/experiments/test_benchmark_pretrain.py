"""`pretrain` alternating with its bare step: which steps are timed, and what is reported."""

from functools import partial
from types import SimpleNamespace

import pytest

from experiments.benchmarks import pretrain as benchmark_pretrain
from experiments.benchmarks.pretrain import Paced, measure_pretrain
from hnet.train import loop
from tests.training import build_once, tiny_run


def set_clock(monkeypatch, readings):
    clock = SimpleNamespace(perf_counter=iter(readings).__next__)
    monkeypatch.setattr(benchmark_pretrain, "time", clock)


@pytest.fixture
def report(tmp_path):
    return Paced(tiny_run(tmp_path), warmup=4, turn=2)


def test_only_steps_between_two_turns_of_equal_slots_are_timed(monkeypatch, report):
    set_clock(monkeypatch, [*range(7), 10, 20, 100, 103, 200, 300, 400])
    turns = []
    monkeypatch.setattr(report, "_take_turn", lambda: turns.append(step))
    for step, capacity in enumerate([8] * 6 + [5] * 8, start=1):
        report.logged({"step": step, "stage0/capacity": capacity}, 0.0)
    # 7 is the first with new slots, 8 began before it was read, 9 to 11 are undisturbed
    assert turns == [11] and report.seconds["run"] == [(103 - 20) / 2]


def test_a_turn_of_bare_steps(monkeypatch, report):
    monkeypatch.setattr(benchmark_pretrain, "build", build_once)
    set_clock(monkeypatch, [0, 10, 10, 11, 11, 14, 20, 30, 30, 35, 35, 36])
    report.capacities = (32,)
    report._take_turn()
    compiled = report.bare[1]
    report._take_turn()
    assert report.seconds["bare"] == [(1 + 3) / 2, (5 + 1) / 2]
    *_, state = report.bare
    assert int(state.step) == 2 * (1 + 2) and report.bare[1] is compiled


def test_figures_are_those_of_the_turns(monkeypatch, report, tmp_path):
    def train(config, stop, report):
        assert config.train.steps == 4 + 3 * (2 + 2) + 1 and not config.eval.every
        report.seconds = {"run": [2.0, 4.0, 5.0], "bare": [1.0, 4.0, 4.0]}

    monkeypatch.setattr(loop, "train", train)
    measure = partial(measure_pretrain, tiny_run(tmp_path), turns=3, warmup=4, turn=2)
    assert measure() == {
        "bytes_per_sec": 8 * 32 / 4.0,
        "bare_step": 8 * 32 / 4.0,
        "over_bare_step": 0.8,
        "lowest_turn": 0.5,
        "highest_turn": 1.0,
    }
    monkeypatch.setattr(loop, "train", lambda config, stop, report: None)
    with pytest.raises(RuntimeError, match="were not steady within 17 steps"):
        measure()
