"""What a tracker gets, and that none can stop a run. The libraries are stand-ins."""

import importlib
import sys
import threading
from dataclasses import replace

import pytest

from hnet.data import open_corpus
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.train import tracker
from hnet.train.config import TrackerConfig
from hnet.train.run_logger import RunLogger, Start
from hnet.train.tracker import Guarded, find
from tests.train.test_run_logger import row_of
from tests.training import tiny_run

LIBRARY = """
calls = []
def init(**arguments): calls.append(("init", arguments))
def log(values, step): calls.append((step, values))
def finish(): calls.append(("finish", {}))
"""


class Broken:
    """Fails at step 2."""

    def begin(self, config):
        self.steps = []

    def scalars(self, step, values):
        self.steps.append(step)
        if step == 2:
            sys.exit("no\nnetwork")

    def end(self):
        raise AssertionError("called after a failure")


def logged(tmp_path, name):
    config = replace(tiny_run(tmp_path), tracker=TrackerConfig(name, "mine"))
    with RunLogger(config, open_corpus(config.data), Start()) as told:
        for step in (1, 2, 3):
            told.step(row_of(step))
    return config


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_library_gets_the_configuration_and_the_tags_of_tensorboard(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    config = logged(tmp_path / "run", name)
    calls = importlib.import_module(name).calls
    monkeypatch.delitem(sys.modules, name)
    assert [call for call, _ in calls] == ["init", 1, 2, 3, "finish"]
    begun = dict(calls[0][1])
    if name == "wandb":
        identity = begun.pop("id")
        assert identity.endswith("-run") and identity.replace("-", "").isalnum()
    own = {"project": "mine", "name": config.workdir, "config": to_json(config)}
    assert begun == own | {"resume": "allow"}
    assert calls[2][1]["train/bpb"] == pytest.approx(2)
    assert calls[2][1]["throughput/bytes_seen/b/*.txt"] == 100


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    logged(tmp_path, f"{__name__}:Broken")
    said = capsys.readouterr().out
    assert said.count("failed (SystemExit: no): the run goes on without it") == 1


def test_a_tracker_that_hangs_loses_rows_and_is_left(monkeypatch):
    goes_on = threading.Event()

    class Hanging(Broken):
        def scalars(self, step, values):
            goes_on.wait(60)

    said = []
    monkeypatch.setattr(tracker, "MAX_WAITING", 3)
    guard = Guarded("hanging", Hanging, said.append)
    guard.begin({})
    for step in range(9):
        guard.scalars(step, {})
    guard.end(0.2)
    goes_on.set()
    assert "does not keep up" in said[0] and said[1].endswith("within 0.2 s: it is left")
    assert len(said) == 3 and said[2].startswith("tracker hanging did not get ")


@pytest.mark.parametrize(("name", "told"), [
    ("wandb", r"needs wandb, which is not installed: pip install 'hnet-jax\[wandb\]'"),
    ("mlflow", "is unknown: use trackio, wandb, or package.module:Class"),
    ("no_such_module:Tracker", "cannot be imported"),
    (f"{__name__}:LIBRARY", "has no begin"),
])  # fmt: skip
def test_a_tracker_that_cannot_be_is_one_line(name, told, monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=told) as raised:
        find(name)
    assert "\n" not in str(raised.value)
