"""Every tool feeds byte 254 if and only if the run was trained with it."""

import json
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import boundaries, fairness
from hnet import load
from hnet.commands import evaluate, segment
from hnet.config import BOS_ID, EOS_ID
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.score import logprobs
from hnet.decode.segment import segmenter
from hnet.interop.convert import _write_workdir
from hnet.model import split
from hnet.suites.scorer import ModelScorer
from tests import training
from tests.networks import MLP_END, network, quick_jit, random_params, stage
from tests.training import run, tiny_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = "abc déf, 12".encode()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run without BOS, in which every number is NaN that depends on byte 254 or 255."""
    graph, params = random_params(network(stage("t1 t1", 26), stage("t1", 26)))
    table = params["embeddings"]["embedding"]
    params["embeddings"]["embedding"] = table.at[jnp.array([BOS_ID, EOS_ID])].set(jnp.nan)
    model = nnx.merge(graph, params)
    model.bos = False
    folder = tmp_path_factory.mktemp("run") / "run"
    _write_workdir(folder, model)
    return folder


def output_of(module, capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    monkeypatch.setattr(module, "enable_compilation_cache", lambda: None, raising=False)
    module.main()
    return capsys.readouterr().out


def test_a_loaded_model_says_how_it_was_trained(workdir):
    assert load(workdir).bos is False
    assert load(workdir, bos=True).bos is True
    graph, params = random_params(network(stage("t1", 26)))
    assert nnx.merge(graph, params).bos is True
    graph, _ = split(load(workdir))
    assert nnx.merge(graph, split(load(workdir))[1]).bos is False


def test_scores_and_texts_follow_the_model(workdir):
    model, sampling = load(workdir), Sampling(max_bytes=3)
    (score,), (fed,) = logprobs(model, [TEXT]), logprobs(model, [TEXT], bos=True)
    assert np.isfinite(score.logprobs[1:]).all() and not np.isfinite(fed.logprobs[1:]).any()
    (text,) = generate(model, [TEXT], sampling)
    (expected,) = generate(model, [TEXT], sampling, bos=False)
    scorer = ModelScorer(model, batch_size=2)
    assert np.isfinite(scorer.score([TEXT])[0].logprobs[1:]).all()
    assert scorer.boundaries([TEXT])[0].stages[0].starts[0] == 0
    assert text.data == expected.data and np.isfinite(text.logprobs).all()


@pytest.mark.few(
    "alignment, bos",
    [("start", True), ("end", False), ("end", True)],
    [(alignment, bos) for alignment in ("start", "end") for bos in (True, False)],
)
def test_segmentation_is_that_of_the_whole_row(alignment, bos):
    config = network(stage("t1 t1", 26, **(MLP_END if alignment == "end" else {})), stage("t1", 26))
    graph, params = random_params(config)
    (found,) = segmenter(graph, config, bos=bos)(params, [TEXT])
    fed = np.frombuffer(bytes([BOS_ID] * bos) + TEXT, np.uint8).astype(np.int32)
    _, (record,) = quick_jit(lambda params: nnx.merge(graph, params)(fed[None]))(params)
    cuts = np.flatnonzero(np.asarray(record.boundary_mask_BL)[0]) + (alignment == "end") - bos
    assert found.stages[0].starts == tuple(sorted({0, *(c for c in cuts if 0 < c < len(TEXT))}))
    assert len(found.stages[0].starts) > 1
    assert len(found.bits) == (len(TEXT) if bos else 0)  # nothing predicts the first byte


def test_commands_follow_the_run(workdir, tmp_path, capsys, monkeypatch):
    ud = {"id": "s1", "text": "abc déf 12", "spans": [[0, 3], [4, 8], [9, 11]]}
    (tmp_path / "ud.jsonl").write_text(json.dumps(ud))
    (tmp_path / "text.txt").write_bytes(TEXT * 9)
    at = ("--checkpoint", workdir)
    out = output_of(segment, capsys, monkeypatch, *at, "--text", "abc", "--json", "True")
    assert "NaN" not in out and json.loads(out)["stages"][0]["starts"][0] == 0
    gold = ("--gold", tmp_path / "ud.jsonl", "--json", "True")
    out = output_of(boundaries, capsys, monkeypatch, *at, *gold)
    (found,) = json.loads(out)["files"][str(tmp_path / "ud.jsonl")]["stages"]
    assert np.isfinite(found["gold"]["words"]["learned"]["f1"])
    assert "NaN" not in out
    files = ("--files", tmp_path / "text.txt", "--json", "True")
    report = json.loads(output_of(evaluate, capsys, monkeypatch, *at, *files))
    assert np.isfinite(report["bpb"]) and report["unscored_bytes"] == 1
    report = json.loads(output_of(evaluate, capsys, monkeypatch, *at, *files, "--bos", "True"))
    assert report["bpb"] is None and report["unscored_bytes"] == 0
    system = fairness.model_system(str(workdir))
    found, nats, scored = system.cut([TEXT])
    assert np.isfinite(nats) and scored == len(TEXT) - 1
    assert found[0].stages[0].starts[0] == 0


@pytest.mark.parametrize("bos", [True, False])
def test_training_draws_its_texts_as_it_reads_them(tmp_path, monkeypatch, bos):
    asked = []

    def spy(*args, **options):
        asked.append(options["bos"])
        raise KeyboardInterrupt

    config = tiny_run(tmp_path)
    monkeypatch.setattr(training, "segmenter_once", spy)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, data=replace(config.data, bos_eos=bos)))
    assert asked == [bos]
