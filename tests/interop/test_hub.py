"""Folders of the Hub against a stub of its HTTP interface; paths of weights of every kind."""

import json
import socket
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from hnet.checkpoint.save import Checkpointer
from hnet.command_line import exit_code
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.interop import convert, load, resolve, to_official
from hnet.interop.__main__ import main
from hnet.interop.card import make_card
from hnet.model import split
from hnet.train.config import CheckpointConfig, Config
from hnet.train.workdir import claim_workdir
from hnet.weights import hub as hub_module
from hnet.weights.own import own_json
from hnet.weights.tensors import TensorFile, write_tensors
from tests.hub_stub import running
from tests.networks import MLP_END, network, official_network, random_params, stage

pytest.importorskip("huggingface_hub", reason="the extra `hub` is missing")

pytestmark = pytest.mark.usefixtures("quick_compilation")

OFFICIAL = official_network((32, "t1 t1"), (32, "T1"))
OWN = network(stage("t1 t1", 26, **MLP_END), stage("t1", 26))
ADDRESS = "hf://me/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    with running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def make_run(folder, config=OFFICIAL, steps=(3, 7), **data):
    """A work directory as training leaves it, and its models by step."""
    run = Config(model=config, workdir=str(folder))
    claim_workdir(run)
    models = {}
    with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as checkpointer:
        for step in steps:
            graph, params = random_params(config, seed=step)
            models[step] = nnx.merge(graph, params)
            checkpointer.save(step, {"params": params}, {})
    rows = [
        {"step": 3, "bytes_seen": 1234, "eval/bpb": 2.5, "stage0/bytes_per_chunk": 4.25},
        {"step": 7, "bytes_seen": 5678, "eval/bpb": 1.75, "stage0/bytes_per_chunk": 5.5},
        {"step": 9, "bytes_seen": 99999, "eval/bpb": 0.5},
        {"step": "x"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models


def assert_equal(a, b):
    ours, theirs = (jax.tree.leaves(split(m)[1]) for m in (a, b))
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def refused(capsys, *arguments, says, code=2):
    assert exit_code(lambda: main([str(a) for a in arguments]))[0] == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for text in [says] if isinstance(says, str) else says:
        assert text in err, err


@pytest.mark.parametrize("config", [OFFICIAL, OWN], ids=["official", "own"])
def test_what_is_pushed_is_pulled_and_loaded(hub, tmp_path, config, capsys):
    models = make_run(tmp_path / "run", config)
    assert main(["push", str(tmp_path / "run"), ADDRESS, "--step", "3"]) == 0
    assert f"{hub.url}/me/model/commit/" in capsys.readouterr().out
    assert main(["push", str(tmp_path / "run"), ADDRESS]) == 0
    assert hub.tokens - {None} == {"Bearer secret"}  # uploads of large files have addresses instead
    first, second = hub.repositories["me/model"]
    assert set(second) == {"model.safetensors", "config.json", "README.md"}
    content = json.loads(second["config.json"])
    assert content == (config.to_json() if config is OFFICIAL else own_json(config))

    assert_equal(load(ADDRESS), models[7])
    from tests.hub_stub import revision

    assert_equal(load(f"{ADDRESS}@{revision(0)}"), models[3])
    assert main(["pull", ADDRESS, str(tmp_path / "pulled")]) == 0
    folder = tmp_path / "pulled"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == second
    assert not any(p.is_symlink() for p in folder.iterdir())
    assert_equal(load(folder), models[7])
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    assert_equal(load(tmp_path / "again"), models[7])
    assert main(["verify", str(folder), str(tmp_path / "run")]) == 0
    assert first["model.safetensors"] != second["model.safetensors"]


def test_the_card_is_made_of_what_the_run_wrote(hub, tmp_path, capsys):
    make_run(tmp_path / "run")
    main(["push", str(tmp_path / "run"), ADDRESS, "--step", "3"])
    (commit,) = hub.repositories["me/model"]
    card = commit["README.md"].decode()
    assert "2.5000 (update 3)" in card and "1,234" in card and "4.25 (update 3)" in card
    assert "1.75" not in card and "99,999" not in card and str(tmp_path) not in card
    count = sum(a.size for a in to_official(nnx.merge(*random_params(OFFICIAL)))[1].values())
    assert f"{count:,}" in card and 'load("hf://me/model")' in card
    assert card.startswith("---\nlibrary_name: hnet-jax\n")
    hostile = make_card("me/a|b`<script>\u202e\n# x", OFFICIAL, 1)
    assert "<script>" not in hostile.split("```")[0] and "\u202e" not in hostile

    hub.commit("me/model", {"README.md": b"my own card"})
    main(["push", str(tmp_path / "run"), ADDRESS])
    assert hub.repositories["me/model"][-1]["README.md"] == b"my own card"
    assert "is kept" in capsys.readouterr().err
    main(["push", str(tmp_path / "run"), ADDRESS, "--replace-card"])
    assert b"1.7500 (update 7)" in hub.repositories["me/model"][-1]["README.md"]


def test_weights_of_others_are_read_by_the_names_they_have(hub, tmp_path):
    model = nnx.merge(*random_params(OFFICIAL))
    config, weights = to_official(model)
    write_tensors(tmp_path / "theirs.safetensors", weights)
    data = (tmp_path / "theirs.safetensors").read_bytes()
    hub.commit("them/a", {"theirs.safetensors": data, "theirs_config.json": b"{}", "x.bin": b"x"})
    hub.commit("them/a", {"theirs.json": json.dumps(config).encode(), "sub/other.pt": b"x"})
    assert_equal(load("hf://them/a"), model)
    asked = " ".join(hub.requests)
    assert "x.bin" not in asked and "other.pt" not in asked
    hub.commit("them/b", {"a.pt": b"x", "b.pt": b"x"})
    with pytest.raises(ConfigError, match="2 files of weights .a.pt, b.pt.: name one"):
        load("hf://them/b")
    hub.commit("them/c", {"notes.txt": b"x"})
    with pytest.raises(ConfigError, match="0 files of weights"):
        load("hf://them/c")
    hub.commit("them/d", {"hnet_1stage_L.safetensors": data})  # the JSON that its name stands for
    with pytest.raises(ConfigError, match="do not fit the configuration"):
        load("hf://them/d")


def test_what_goes_wrong_is_one_line_and_nothing_is_written(hub, tmp_path, capsys):
    make_run(tmp_path / "run")
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    new = tmp_path / "new"
    refused(capsys, "pull", "hf://me/nothing", new, says="'hf://me/nothing' is not on the Hub")
    hub.commit("me/model", {"model.safetensors": b"xx", "config.json": b"{}"})
    refused(capsys, "pull", f"{ADDRESS}@{'0' * 40}", new, says="no such revision")
    refused(capsys, "pull", ADDRESS, new, says="cannot be read safely")
    refused(capsys, "pull", ADDRESS, tmp_path / "run", says="exists")
    refused(capsys, "push", tmp_path / "run", f"{ADDRESS}@nowhere@x", says="hf://owner/name")
    refused(capsys, "push", tmp_path / "nothing", ADDRESS, says="nothing' does not exist")
    refused(capsys, "push", tmp_path / "run", ADDRESS, "--step", "4", says="checkpoint")
    for address in ("hf://", "hf://a", "hf://a/b/c", "hf://a/b@", "hf://a/../b@x y", "me/model"):
        refused(capsys, "pull", address, new, says=["hf://owner/name"])
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    assert len(hub.repositories["me/model"]) == 1


@pytest.mark.parametrize("command", ["pull", "push"])
def test_a_hub_that_does_not_answer_is_given_up(tmp_path, monkeypatch, capsys, command):
    make_run(tmp_path / "run")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "SECONDS", 0.3)
    new = tmp_path / "new"
    arguments = [ADDRESS, new] if command == "pull" else [tmp_path / "run", ADDRESS]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        refused(capsys, command, *arguments, says="the Hub cannot be used")
    refused(capsys, command, *arguments, says="the Hub cannot be used")  # no server
    assert not new.exists()


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    says = "needs huggingface_hub, which is not installed: pip install 'hnet-jax[hub]'"
    refused(capsys, "pull", ADDRESS, tmp_path / "new", says=says)
    refused(capsys, "push", tmp_path / "run", ADDRESS, says=says)
    with pytest.raises(ConfigError, match="hnet-jax.hub"):
        load(ADDRESS)


def test_offline_the_cache_is_enough(hub, monkeypatch):
    model = nnx.merge(*random_params(OFFICIAL))
    config, weights = to_official(model)
    import huggingface_hub
    from safetensors.numpy import save

    files = {"model.safetensors": save(weights), "config.json": json.dumps(config).encode()}
    hub.commit("me/model", files)
    assert_equal(load(ADDRESS), model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert_equal(load(ADDRESS), model)
    with pytest.raises(ConfigError, match="the Hub cannot be used"):
        load("hf://me/other")
    assert len(hub.requests) == asked


# --- paths ----------------------------------------------------------------------------------------


def test_paths_of_every_kind_lead_to_their_weights(tmp_path, monkeypatch):
    models = make_run(tmp_path / "run")
    assert resolve(tmp_path / "run") == (str(tmp_path / "run"), None, True)
    assert_equal(load(tmp_path / "run"), models[7])
    step = tmp_path / "run" / "checkpoints" / "3"
    assert resolve(step)[1:] == (3, True) and resolve(step, 3)[1:] == (3, True)
    assert_equal(load(step), models[3])
    monkeypatch.chdir(step)
    assert_equal(load("."), models[3])
    with pytest.raises(ConfigError, match="is a step, and step=7 another"):
        load(step, step=7)
    convert(tmp_path / "run", tmp_path / "files" / "a.safetensors", step=3)
    for path in (tmp_path / "files", tmp_path / "files" / "a.safetensors"):
        assert resolve(path) == (str(tmp_path / "files" / "a.safetensors"), None, False)
        assert_equal(load(path), models[3])
        with pytest.raises(ConfigError, match="no step=3"):
            load(path, step=3)
    write_tensors(tmp_path / "files" / "b.npz", dict(TensorFile(resolve(path).path)))
    with pytest.raises(ConfigError, match="2 files of weights"):
        resolve(tmp_path / "files")
    for path in ("nothing", tmp_path / "x\0", "x" * 300, tmp_path / "run" / "config.json" / "a"):
        with pytest.raises(ConfigError, match="^checkpoint="):
            resolve(path)
    with pytest.raises(ConfigError, match="no known format"):
        load(tmp_path / "run" / "config.json")
    with pytest.raises(ConfigError, match="has its own"):
        load(tmp_path / "run", config=tmp_path / "files" / "a.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c | {"more": 1}, "unknown content"),
        (lambda c: c | {"model": None}, "model"),
        (lambda c: {"format": "hnet-jax"}, "model"),
        (lambda c: c | {"model": c["model"] | {"d": 1}}, "unknown field model.d"),
        (lambda c: c | {"model": c["model"] | {"mixers": [["k", "antigravity:A"]]}}, "another mod"),
        (lambda c: c | {"model": c["model"] | {"tie_embeddings": True}}, "do not fit"),
        (lambda c: c | {"format": "other"}, "unknown content"),
    ],
)
def test_a_json_of_our_own_form_is_not_trusted(tmp_path, change, says):
    graph, params = random_params(OWN)
    flat = {".".join(str(k.key) for k in keys): np.asarray(a)
            for keys, a in jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
    write_tensors(tmp_path / "model.safetensors", flat)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(own_json(OWN)))
    assert_equal(load(tmp_path), nnx.merge(graph, params))
    path.write_text(json.dumps(change(own_json(OWN))))
    with pytest.raises(ConfigError, match=says):
        load(tmp_path)
    assert "antigravity" not in sys.modules


def test_models_with_parts_of_other_modules_are_not_pushed():
    content = own_json(OWN)
    content["model"]["mixers"] = [["k", "my_paper.layers:Kernel"]]
    with pytest.raises(ConfigError, match="another module"):
        from hnet.weights.own import config_of_own

        config_of_own(content)
    assert isinstance(config_of_own(own_json(OWN)), HNetConfig)
