"""Sweeps: search spaces and their errors, claims of several workers, results, resume."""

import csv
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from experiments import sweep
from hnet.command_line import FAILED
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.sweep import results as sweep_results
from hnet.sweep import train as sweep_train
from hnet.sweep.space import list_points, read_space
from hnet.sweep.study import Study
from hnet.train import loop, parallel_runs
from hnet.train.config import CheckpointConfig, EvalConfig, TrainConfig
from hnet.train.lock import DirectoryLock, process_name
from hnet.train.metrics_file import read_metrics
from hnet.train.named import run_config
from hnet.train.session import StopRun
from tests.quick import QUICK, QUICK_FLAGS
from tests.training import build_once, tiny_run

ROOT = Path(__file__).parents[2]
RATES = "[space]\noptim.learning_rate = [1e-3, 4e-3]\nseed = [0, 1]\n"


def write(folder: Path, text: str) -> str:
    file = folder / "space.toml"
    file.write_text(text)
    return str(file)


def test_a_missing_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna.trial", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sweep.__file__)
    assert end.value.code == 2
    message = "error: the library optuna is missing: pip install 'hnet-jax[sweep]'\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the space in .* is empty: name at least one field"),
        ("[space]\n", "is empty"),
        ("[space", "is not TOML"),
        ("sampler = 'grids'\n[space]\nseed = [1]", "sampler='grids': use one of grid, random"),
        ("smapler = 'grid'\n[space]\nseed = [1]", "unknown setting 'smapler'.*mean sampler"),
        ("[space]\noptim.weight_deca = [1]", "field optim.weight_deca: did you mean optim.weight_"),
        ("[space]\nmodel.stages.7.d_model = [1]", "unknown field model.stages.7: known are 0, 1"),
        ("[space]\noptim.learning_rate = ['x']", "optim.learning_rate='x': expected float"),
        ("[space]\noptim.learning_rate = []", "space.optim.learning_rate=.*at least one value"),
        ("[space]\noptim.learning_rate = [1, 1]", "is there twice"),
        ("[space]\noptim.learning_rate = 1e-3", "give a list of values or"),
        ("[space]\noptim.b1 = {low = 0, high = 0.9, log = true}", "use numbers above 0"),
        ("[space]\noptim.b1 = {low = 0.1, high = 0.9}", "a grid needs num"),
        ("sampler = 'tpe'\n[space]\noptim.b1 = [0.8]", "trials=0: sampler='tpe' needs"),
        ("[space]\nmodel.stages.0.d_model = [16, 40]\nseed=[0]", "d_model=24.* gives 40 .*=40"),
        ("[space]\nworkdir = ['a']", "every run gets its own"),
        ("[space]\nseed = ['a']", "space.seed: give a list of whole numbers"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_one_line(tmp_path, text, says):
    base = tiny_run(tmp_path)
    with pytest.raises(ConfigError, match=says) as error:
        list_points(base, read_space(write(tmp_path, text), base))
    assert "\n" not in str(error.value)


def test_points_of_one_program_stand_together_and_seeds_are_runs(tmp_path, capsys):
    text = """[space]
    optim = { learning_rate = { low = 1e-3, high = 1e-1, log = true, num = 3 } }
    data.batch_size = [8, 16]
    model.stages.0.chunking.target_ratio = { low = 2, high = 4, num = 2 }
    seed = [0, 5, 6]"""
    base = tiny_run(tmp_path)
    points = list_points(base, read_space(write(tmp_path, text), base))
    assert len(points) == 12 and all(len(point.runs) == 3 for point in points)
    assert [len({p.group for p in part}) for part in (points[:6], points[6:], points)] == [1, 1, 2]
    assert [p.runs[2].optim.learning_rate for p in points[:5:4]] == [1e-3, pytest.approx(1e-1)]
    assert points[1].runs[1].model.stages[0].chunking.target_ratio == 4.0
    assert [run.seed for run in points[0].runs] == [0, 5, 6]
    (tmp_path / "tiny.json").write_text(json.dumps(to_json(base)))
    argv = [str(tmp_path / "tiny.json"), "--space", str(tmp_path / "space.toml"), "--dry-run"]
    assert sweep.main([*argv, "--out", str(tmp_path / "out"), "--width", "12"]) == 0
    said = capsys.readouterr().out
    assert "4 points x 3 seeds in one program" in said and "12 points, 36 runs, 4 programs" in said
    assert not (tmp_path / "out").exists()


def open_study(folder: Path, worker: str, text: str = RATES, timeout: float = 60.0) -> Study:
    folder.mkdir(exist_ok=True)
    base = tiny_run(folder / "run")
    study = Study(
        str(folder / "journal"), "s", base, read_space(write(folder, text), base), timeout
    )
    study.worker = worker
    return study


def test_another_spelling_of_the_text_is_the_same_sweep_and_other_text_is_not(tmp_path):
    base = tiny_run(tmp_path / "run")
    space = read_space(write(tmp_path, RATES), base)

    def study(base, read):
        return Study(str(tmp_path / "journal"), "s", base, space, 60.0, read)

    study(base, {"data.files": "aa"})
    data = replace(base.data, files=("synthetic:latin:9",), num_workers=2)
    study(replace(base, data=data), {"data.files": "aa"})
    study(base, None)
    with pytest.raises(ConfigError, match="sweep: inputs.data.files is 'aa' there, here 'b"):
        study(base, {"data.files": "bb"})
    with pytest.raises(ConfigError, match="another sweep: config.data.files.0 is 'synthetic:"):
        study(replace(base, data=data), None)
    model = replace(base.model, stages=(base.model.stages[0], *base.model.stages))
    with pytest.raises(
        ConfigError, match=r"stages is \(2 of them\) there, here \(3 of them\): use"
    ):
        study(replace(base, model=model), {"data.files": "aa"})


def finish(study: Study, claims, bpb: float = 1.0) -> None:
    for claim in claims:
        run = {"seed": 0, "step": 8, "bpb": bpb, "bytes_per_chunk": [], "overflow": [], "curve": []}
        assert study.finish(claim, [run], bpb)


def test_two_workers_share_the_points_and_none_is_done_twice(tmp_path):
    text = "[space]\noptim.learning_rate = {low = 1e-3, high = 4e-3, num = 7}\n"
    one, two = (open_study(tmp_path, name, text) for name in ("here//1", "there//2"))
    one_has, two_has = one.claim(3), two.claim(3)
    one_has += one.claim(3)
    assert (len(one_has), len(two_has)) == (4, 3) and not two.claim(3)
    keys = [claim.point.key for claim in one_has + two_has]
    assert len(set(keys)) == 7
    finish(one, one_has)
    two.release(two_has)  # as after a stop request
    again = one.claim(9)
    assert {c.point.key for c in again} == {c.point.key for c in two_has}
    finish(one, again)
    assert not one.is_pending() and not two.claim(3) and one.num_done() == two.num_points == 7
    with pytest.raises(ConfigError, match="study 's' in .* is another sweep"):
        open_study(tmp_path, "else//3", RATES)


@pytest.mark.parametrize("name", ["train_parallel_runs", "train"])
def test_points_whose_folder_is_locked_are_returned(tmp_path, monkeypatch, name):
    """A worker that counted as dead still trains them: they are neither failed nor done twice."""
    separate = name == "train"
    study = open_study(tmp_path, "a", RATES.replace(", 1]", "]") if separate else RATES)
    trains = getattr(sweep_train, name)

    def held(first, *others, **hooks):
        with DirectoryLock(first.workdir if separate else others[0]):
            return trains(first, *others, **hooks)

    monkeypatch.setattr(sweep_train, name, held)
    monkeypatch.setattr(sweep_train.time, "sleep", lambda seconds: None)
    claims = study.claim(1 if separate else 9)
    options = sweep_train.Options(tmp_path / "out", 4, 60.0)
    assert len(claims) == 2 - separate and sweep_train.train_points(study, claims, options, None)
    assert study.num_done() == 0
    again = study.claim(9)
    assert {c.point.key for c in again} >= {c.point.key for c in claims} and len(again) == 2


def test_claims_made_at_the_same_moment_are_one_too_many_or_twins(tmp_path):
    tpe = "sampler = 'tpe'\ntrials = 2\n[space]\noptim.b1 = {low = 0.8, high = 0.95}\n"
    study = open_study(tmp_path / "tpe", "here//1", tpe)
    asked = [study._ask(n) for n in range(3)]
    assert [study._counts(trial) for trial in asked] == [True, True, False]
    study = open_study(tmp_path / "many", "here//1", tpe.replace("2", "9"))
    for _ in range(2):  # two workers enqueue the point of a dead worker
        study.study.enqueue_trial({"optim.b1": 0.9})
    assert len(study.claim(2)) == 2
    trials = study.trials()
    assert [t.state.name for t in trials] == ["RUNNING", "FAIL", "RUNNING"]
    assert trials[0].params == trials[1].params != trials[2].params


def test_points_of_a_dead_worker_are_taken_up_by_one_other(tmp_path):
    silent = open_study(tmp_path, "far//1")
    (held,) = silent.claim(1)
    one, two = (open_study(tmp_path, f"near//{i}", timeout=0.4) for i in (2, 3))
    with one, two:
        assert len(one.claim(1)) == 1 and not two.claim(1)
        with silent:  # it sends heartbeats
            assert not one.claim(1) and not two.claim(1)
        retaken, end = [], time.monotonic() + 60
        while not retaken and time.monotonic() < end:
            time.sleep(0.1)
            retaken = one.claim(9) + two.claim(9)
        assert [claim.point.key for claim in retaken] == [held.point.key]
        assert not silent.finish(held, [], 1.0)  # too late: the claim was taken over
        assert not one.num_done()


def test_what_a_killed_process_of_this_machine_held_is_free_at_once(tmp_path):
    code = (
        "import pathlib, os, sys; from tests.sweep.test_sweep import open_study\n"
        "from hnet.train.lock import process_name\n"
        "open_study(pathlib.Path(sys.argv[1]), process_name()).claim(1); os._exit(9)"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, timeout=120)
    study = open_study(tmp_path, "near//2")
    assert [t.state.name for t in study.trials()] == ["RUNNING", "WAITING"]
    assert len(study.claim(9)) == 2


def test_tpe_asks_for_as_many_points_as_wanted_and_prunes_the_worse(tmp_path):
    text = "sampler = 'tpe'\ntrials = 6\npruner = 'median'\n" + (
        "[space]\noptim.learning_rate = {low = 1e-3, high = 1e-2, log = true}\n"
        "optim.schedule = ['wsd', 'cosine']\noptim.lr_multipliers = [[1.0, 2.0], 'none']\n"
    )
    one, two = (open_study(tmp_path, name, text) for name in ("here//1", "there//2"))
    claims = one.claim(4)
    for n, claim in enumerate(claims):
        assert not sweep_train._prune(one, [claim], 4, [2.0 + n])
    finish(one, claims)
    worse = two.claim(9)
    assert len(worse) == 2 and len({c.point.key for c in claims + worse}) == 6
    assert sweep_train._prune(two, worse, 4, [9.0, 9.0]) and all(claim.pruned for claim in worse)
    for claim in worse:
        assert two.finish(claim, [], None)
    assert not one.claim(1) and not one.is_pending()
    assert sorted(t.state.name for t in one.finished()) == ["COMPLETE"] * 4 + ["PRUNED"] * 2


def sweep_in_process(folder: Path, out: Path, space: str, *argv: str, **changes) -> int:
    base = tiny_run(folder / "run", train=TrainConfig(steps=4, log_every=1), **changes)
    (folder / "tiny.json").write_text(json.dumps(to_json(base)))
    quick = partial(parallel_runs.build, compiler_options=QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_runs, "build", quick)
        patch.setattr(loop, "build", build_once)
        patch.setattr(sweep, "enable_compilation_cache", lambda: None)
        start = [str(folder / "tiny.json"), "--space", write(folder, space), "--out", str(out)]
        return sweep.main([*start, *argv])


def test_a_sweep_leaves_table_plot_hparams_and_a_configuration_to_train(tmp_path, capsys):
    out, once = tmp_path / "out", {"eval": EvalConfig(every=2, max_bytes=200)}
    assert sweep_in_process(tmp_path, out, RATES, **once) == 0
    assert "compiled or loaded 1 training programs" in capsys.readouterr().out
    with (out / "results.csv").open() as f:
        table = list(csv.DictReader(f))
    assert [(row["optim.learning_rate"], row["seed"]) for row in table] == [
        ("0.001", "0"), ("0.001", "1"), ("0.004", "0"), ("0.004", "1"),
    ]  # fmt: skip
    assert all(row["state"] == "done" and float(row["eval/bpb"]) < 8.1 for row in table)
    assert {"eval/stage0/bytes_per_chunk", "stage0/overflow_frac"} <= table[0].keys()
    assert (out / "results.parquet").stat().st_size and (out / "results.png").stat().st_size
    assert len(list((out / "tensorboard").glob("*/events*"))) == 4
    best = run_config([str(out / "best.json")])
    means = {r: sum(float(x["eval/bpb"]) for x in table if x["optim.learning_rate"] == r)
             for r in ("0.001", "0.004")}  # fmt: skip
    assert best.optim.learning_rate == float(min(means, key=means.get))
    assert best.workdir == str(out / "best")

    before = (out / "results.csv").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sweep_train, "train_parallel_runs", lambda *_, **__: pytest.fail("trained again")
        )
        assert sweep_in_process(tmp_path, out, RATES, **once) == 0
        with pytest.raises(ConfigError, match="has the results of study 'out', not of 'new'"):
            sweep_in_process(tmp_path, out, RATES, "--study", "new", **once)
    assert (out / "results.csv").read_bytes() == before


def test_a_single_point_is_a_run_of_its_own_and_a_fault_leaves_the_others(tmp_path, monkeypatch):
    text = "[space]\noptim.learning_rate = [9e-3, 1e-3]\n"
    train = sweep_train.train

    def fails_once(config, *arguments):
        if config.optim.learning_rate == 9e-3:
            raise StopRun("non-finite loss: lower optim.learning_rate")
        return train(config, *arguments)

    monkeypatch.setattr(sweep_train, "train", fails_once)
    out, twice = tmp_path / "out", {"eval": EvalConfig(every=2, max_bytes=200)}
    assert sweep_in_process(tmp_path, out, text, "--width", "1", **twice) == 0
    with (out / "results.csv").open() as f:
        table = list(csv.DictReader(f))
    assert [row["state"] for row in table] == ["failed", "done"]
    assert "non-finite" in table[0]["fault"] and not table[1]["fault"]
    (folder,) = (out / "runs").iterdir()
    assert folder.name.startswith("learning_rate=0.001-")
    last = read_metrics(folder)[-1]
    assert last["step"] == 4 and str(last["eval/bpb"]) == table[1]["eval/bpb"]
    none = tmp_path / "none"
    assert sweep_in_process(tmp_path, none, text, "--train.accumulate", "3", **twice) == FAILED


def start(folder: Path) -> subprocess.Popen:
    long = tiny_run(
        folder / "run", train=TrainConfig(steps=100_000), eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=4),
    )  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(to_json(long)))
    command = [sys.executable, "-m", "experiments.sweep", str(folder / "tiny.json")]
    command += ["--space", write(folder, RATES), "--out", str(folder / "out")]
    env = os.environ | {
        "XLA_FLAGS": QUICK_FLAGS,
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def newest(out: Path) -> int:
    found = out.glob("groups/*/checkpoints/*/manifest.json")
    return max((int(path.parent.name) for path in found), default=0)


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), process.communicate(timeout=10)


@pytest.mark.every
def test_a_killed_sweep_goes_on_where_it_was_and_a_terminated_one_says_so(tmp_path):
    out = tmp_path / "out"
    process = start(tmp_path)
    wait_for(lambda: newest(out) >= 8, process)
    process.kill()
    process.communicate(timeout=60)
    before = newest(out)
    process = start(tmp_path)
    wait_for(lambda: newest(out) > before, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "the same command goes on" in stdout
    assert len(list((out / "groups").iterdir())) == 1
    (file,) = out.glob("groups/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[:3] == [1, 10, 20][: len(steps)]
    states = [t.state.name for t in open_study_of(out, tmp_path).trials()]
    assert states == ["FAIL"] * 4 + ["WAITING"] * 2


MANY = "[space]\noptim.learning_rate = {low = 1e-3, high = 9e-3, num = 12}\nseed = [0]\n"


def work_on_many(folder: Path) -> None:
    """One worker of the sweep MANY; it records the points it starts and finishes them at once."""

    def train_points(study, claims, options, stop):
        with (folder / "started").open("a") as f:
            f.writelines(f"{claim.point.key}\n" for claim in claims)
        for claim in claims:
            rate = claim.point.values["optim.learning_rate"]
            curve = [(step, rate) for step in range(500)]  # long lines in the journal
            run = {"seed": 0, "step": 8, "bpb": rate, "bytes_per_chunk": [], "overflow": []}
            sweep_train._finish(study, claim, [{**run, "curve": curve}])
        return True

    sweep.train_points = train_points
    # a trial that died before it had a worker's name can only be given up after the timeout
    study = open_study(folder, process_name(), MANY, timeout=3.0)
    with study:
        sweep._work(study, sweep_train.Options(folder, 3, 60.0), Never())


class Never:
    def stop_requested(self, step):
        return False


@pytest.mark.every
def test_a_sweep_killed_at_any_time_repeats_nothing_that_was_done(tmp_path):
    """Workers are killed (SIGKILL) one by one, each after a random number of journal bytes.

    The next tests, and those of dead workers above, have the faults that this leads to one by one.
    """
    code = "import pathlib, sys; from tests.sweep.test_sweep import work_on_many as work\n"
    code += "work(pathlib.Path(sys.argv[1]))"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    journal, started, rng = tmp_path / "journal", tmp_path / "started", random.Random(0)
    written = lambda: journal.stat().st_size if journal.exists() else 0
    looks = []

    def worker(bytes_to_live: float) -> None:
        end, late = written() + bytes_to_live, time.monotonic() + 200
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
            while written() < end and time.monotonic() < late and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.01))
            process.kill()

    for _ in range(3):
        worker(rng.uniform(0, 60_000))
        # the dead worker's lock: the next worker would wait 30 s before it removes it
        (tmp_path / "journal.lock").unlink(missing_ok=True)
        if journal.exists():  # a kill seldom interrupts a write, so simulate one
            with journal.open("ab") as f:
                f.write(b'{"op_code": 8, "wor')
        before = started.read_text().splitlines() if started.exists() else []
        study = open_study(tmp_path, "looks//1", MANY)
        looks.append(({study._key(t) for t in study.finished()}, len(before)))
    worker(math.inf)  # ends by itself, long before the time limit
    study = open_study(tmp_path, "looks//1", MANY)
    keys, starts = [study._key(t) for t in study.finished()], started.read_text().splitlines()
    assert sorted(keys) == sorted(point.key for point in study.points) and not study.is_pending()
    assert all(t.value == t.params["optim.learning_rate"] for t in study.finished())
    assert 1 < len({len(done) for done, _ in looks})  # workers died in the middle of the sweep
    for done, count in looks:
        assert done <= set(keys) and not done & set(starts[count:])
    assert len(starts) <= len(keys) + 3 * len(looks)


def test_half_a_line_of_a_killed_worker_is_cut_off(tmp_path):
    study = open_study(tmp_path, "here//1")
    finish(study, study.claim(1))
    with (tmp_path / "journal").open("ab") as f:
        f.write(b'{"op_code":4,"worker')
    other = open_study(tmp_path, "there//2")
    finish(other, other.claim(9))
    assert other.num_done() == open_study(tmp_path, "late//3").num_done() == 2


def test_what_a_killed_worker_wrote_of_a_run_is_not_taken_for_all_of_it(tmp_path, monkeypatch):
    study = open_study(tmp_path, "here//1", "[space]\noptim.learning_rate = [1e-3]\nseed = [0]\n")
    finish(study, study.claim(1))

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep_results.RunWriter, "scalars", dies)
        sweep_results._write_hparams(study, tmp_path / "tensorboard")
    assert not list((tmp_path / "tensorboard").iterdir())
    sweep_results._write_hparams(study, tmp_path / "tensorboard")
    (run,) = (tmp_path / "tensorboard").iterdir()
    assert run.name.endswith("learning_rate=0.001-seed=0") and list(run.glob("events*"))


def open_study_of(out: Path, folder: Path) -> Study:
    base = run_config([str(folder / "tiny.json")])
    space = read_space(str(folder / "space.toml"), base)
    return Study(str(out / "journal.log"), "out", base, space, 60.0)
