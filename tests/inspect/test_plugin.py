"""The plugin's backend through TensorBoard's own WSGI application."""

import builtins
import inspect
import json
import os
import shutil
import subprocess
import sys
import types
from urllib.parse import urlencode

import numpy as np
import pytest
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from hnet.inspect import index, store
from hnet.inspect import plugin as plugin_module
from hnet.inspect.plugin import BoundariesPlugin
from hnet.inspect.segmentation import Segmentation
from tests.inspect_samples import probe_texts, segment

RUNS, STEPS = 100, 200


class Backend:
    def __init__(self, logdir, **flags):
        flags = types.SimpleNamespace(logdir_spec="", **flags)
        self.plugin = BoundariesPlugin(TBContext(logdir=str(logdir), flags=flags))

    def get(self, route, **arguments):
        app = self.plugin.get_plugin_apps()[route]
        answer = Client(app).get("/?" + urlencode(arguments))
        is_json = answer.content_type == "application/json"
        return answer.status_code, json.loads(answer.data) if is_json else answer.text


def write(logdir, steps, count=2, seed=0):
    rng = np.random.default_rng(seed)
    log = store.SegmentationLog(logdir)
    for step in steps:
        log.write(step, [segment(t, step / 1000, rng) for t in probe_texts()[-count:]])
    log.close()


@pytest.fixture(scope="module")
def many_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write(root / "run000" / "tensorboard", range(STEPS))
    for i in range(1, RUNS):
        shutil.copytree(root / "run000", root / f"run{i:03}")
    return root


@pytest.fixture
def opened(monkeypatch):
    """Names of the files opened while the test runs."""
    names, real = [], builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda f, *a, **k: names.append(str(f)) or real(f, *a, **k)
    )
    return names


def test_a_view_of_one_among_many_opens_three_files(many_runs, opened):
    backend = Backend(many_runs)
    assert backend.plugin.is_active()
    status, found = backend.get("/runs")
    assert status == 200 and len(found["runs"]) == RUNS and not opened
    run = found["runs"][57]
    _, info = backend.get("/run", run=run)
    assert info["steps"] == list(range(STEPS)) and len(opened) == 1
    opened.clear()
    _, view = backend.get("/view", run=run, step=123, keys=",".join(info["texts"]))
    assert len(view["views"]) == 2
    assert sorted(map(os.path.basename, opened)) == [index.STEPS, index.TEXTS]


def test_views_are_segmentations(tmp_path):
    write(tmp_path / "a", [5], seed=3)
    _, info = Backend(tmp_path).get("/run", run="a")
    _, answer = Backend(tmp_path).get("/view", run="a", step=5, keys=",".join(info["texts"]))
    rng = np.random.default_rng(3)
    expected = [segment(t, 0.005, rng) for t in probe_texts()[-2:]]
    assert [Segmentation.from_json(v) for v in answer["views"].values()] == expected
    assert [t["name"] for t in info["texts"].values()] == ["hostile", "invalid bytes"]


def test_search_in_texts(tmp_path):
    write(tmp_path / "a", [5], count=len(probe_texts()))
    backend = Backend(tmp_path)
    texts = backend.get("/run", run="a")[1]["texts"]

    def found(query):
        status, answer = backend.get("/search", run="a", query=query)
        assert status == 200
        return [texts[key]["name"] for key in answer["keys"]]

    assert found("LIGHTHOUSE") == ["english"] and found("白色") == ["chinese"]
    assert found("<img SRC=x") == ["hostile"] and found("\x1b[31m") == ["invalid bytes"]
    assert found("\ufffd") == ["invalid bytes"] and found("nowhere") == []
    assert len(found("")) == len(texts)
    assert backend.get("/search", run="b", query="x")[0] == 404


def test_new_steps_appear(tmp_path):
    write(tmp_path / "a", [1])
    backend = Backend(tmp_path)
    assert backend.get("/run", run="a")[1]["steps"] == [1]
    write(tmp_path / "a", [2])
    assert backend.get("/run", run="a")[1]["steps"] == [1, 2]


def test_activity_is_looked_up_rarely_and_reads_nothing(many_runs, opened, monkeypatch):
    scans = []
    real = plugin_module._find_runs
    monkeypatch.setattr(plugin_module, "_find_runs", lambda r: scans.append(r) or real(r))
    backend = Backend(many_runs)
    assert all(backend.plugin.is_active() for _ in range(50))
    assert len(scans) == 1 and not opened


def test_inactive_without_data(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / index.FOLDER).mkdir()  # without an index
    assert not Backend(tmp_path).plugin.is_active()
    assert not Backend(tmp_path / "none").plugin.is_active()
    assert not Backend("gs://bucket/runs").plugin.is_active()


@pytest.mark.parametrize("run", ["../secret", "a/../../secret", "/etc", "", "a\0b", "..", "A"])
def test_a_run_that_was_not_found_is_refused(tmp_path, run):
    write(tmp_path / "runs" / "a", [1])
    write(tmp_path / "secret", [1])
    backend = Backend(tmp_path / "runs")
    for route in ("/run", "/view"):
        assert backend.get(route, run=run, step=1, keys="x")[0] == 404
    assert backend.get("/run", run="a")[0] == 200


def test_requests_without_sense_are_refused(tmp_path):
    write(tmp_path / "a", [1])
    backend = Backend(tmp_path)
    assert backend.get("/view", run="a", step="x", keys="k")[0] == 400
    assert backend.get("/view", run="a", step=1, keys="k," * 99)[0] == 400
    assert backend.get("/view", run="a", step=7, keys="k") == (200, {"views": {}})


def test_names_of_runs(tmp_path):
    """Names as in TensorBoard, without /tensorboard; links are followed once."""
    root = tmp_path / "all"
    write(root, [1])
    write(root / "b" / "tensorboard", [1])
    write(root / "b" / "checkpoints" / "x", [1])  # never looked into
    write(root / "c", [1])
    write(root / "c" / "tensorboard", [1])  # without it, c would be two runs
    write(root / "d\x1b[2J\u202e\n", [1])
    os.symlink(root, root / "b" / "cycle")
    os.symlink(root / "b" / "tensorboard", root / "linked")
    os.symlink(root / "nowhere", root / "dangling")
    backend = Backend(root)
    found = backend.get("/runs")[1]["runs"]
    assert found == ["all", "b", "c", "c/tensorboard", "d\\u{001b}[2J\\u{202e}\\n"]
    assert all(backend.get("/run", run=run)[1]["steps"] == [1] for run in found)
    assert Backend(root / "c").get("/runs")[1]["runs"] == ["c", "tensorboard"]


def test_names_that_look_alike_are_told_apart(tmp_path):
    for name in (b"a\xff", b"a\\xff", b"a\\xff/tensorboard"):
        write(os.fsdecode(os.fsencode(tmp_path) + b"/" + name), [1])
    found = Backend(tmp_path).get("/runs")[1]["runs"]
    assert sorted(found) == ["a\\xff", "a\\xff (2)", "a\\xff/tensorboard"]


def test_runs_lie_as_deep_as_they_like(tmp_path):
    """Deeper than Python's recursion limit."""
    folder, limit = str(tmp_path), sys.getrecursionlimit()
    for _ in range(500):
        os.mkdir(folder := folder + "/d")
    try:
        write(folder, [1])
        backend = Backend(tmp_path)
        sys.setrecursionlimit(len(inspect.stack(0)) + 300)
        assert len(backend.get("/runs")[1]["runs"]) == 1
    finally:
        sys.setrecursionlimit(limit)
        # pytest cannot remove it: Python's rmtree would recurse as deep
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


@pytest.mark.parametrize("name", [index.INDEX, index.STEPS, index.TEXTS])
@pytest.mark.parametrize(
    "line",
    [b'{"step": Infinity, "rows": {}}', b'{"text": "k"}', b"[" * 100_000, b"\xff", b"<html>",
     b'{"step": 1, "rows": {"k": [1e300, 1e300]}}', b'{"step": 1, "rows": {"k": [0, 4]}}'],
)  # fmt: skip
def test_damaged_files_are_no_error(tmp_path, name, line):
    write(tmp_path / "a", [1])
    with open(tmp_path / "a" / index.FOLDER / name, "ab") as f:
        f.write(line + b"\n")
    backend = Backend(tmp_path)
    status, info = backend.get("/run", run="a")
    assert status == 200 and info["steps"] == [1] and len(info["texts"]) == 2
    assert info["damaged"] == (name == index.INDEX and b"[0, 4]" not in line)
    keys = ",".join([*info["texts"], "k", "constructor", "__proto__"])
    status, found = backend.get("/view", run="a", step=1, keys=keys)
    assert status == 200 and list(found["views"]) == list(info["texts"])


@pytest.mark.parametrize("name", [index.INDEX, index.STEPS, index.TEXTS])
def test_files_that_are_none_are_no_error(tmp_path, name):
    write(tmp_path / "a", [1])
    backend = Backend(tmp_path)
    keys = ",".join(backend.get("/run", run="a")[1]["texts"])
    path = tmp_path / "a" / index.FOLDER / name
    path.unlink()
    os.mkfifo(path)
    assert backend.get("/run", run="a")[0] == 200
    assert Backend(tmp_path).get("/runs")[0] == 200
    empty = (
        {} if name != index.INDEX else backend.get("/view", run="a", step=1, keys=keys)[1]["views"]
    )
    assert backend.get("/view", run="a", step=1, keys=keys) == (200, {"views": empty})


def test_logdir_spec(tmp_path):
    write(tmp_path / "x", [1])
    write(tmp_path / "y" / "deep", [1])
    flags = types.SimpleNamespace(logdir_spec=f"first:{tmp_path / 'x'},second:{tmp_path / 'y'}")
    backend = Backend(tmp_path)
    backend.plugin = BoundariesPlugin(TBContext(logdir="", flags=flags))
    assert backend.get("/runs")[1]["runs"] == ["first", "second/deep"]


def test_assets_are_one_module_without_remote_parts():
    backend = Backend("none")
    status, script = backend.get("/index.js")
    assert (
        status == 200
        and "import " not in script
        and "http" not in script.replace("http://www.w3.org/2000/svg", "").replace("overHttp", "")
    )
    assert script.count("export ") == 1
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script
    assert backend.get("/style.css")[0] == 200
    assert backend.plugin.frontend_metadata().es_module_path in backend.plugin.get_plugin_apps()


def test_the_plugin_starts_without_jax():
    code = "import hnet.inspect.plugin, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
