"""`experiments.boundaries` on annotated files, against counts by plain loops."""

import json
import math
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import boundaries
from hnet.decode.segment import segment_all
from hnet.errors import ConfigError
from hnet.model import split
from tests.networks import MLP_END, network, quick_jit, random_params, stage
from tests.training import segmenter_once

UD = {"id": "s1", "text": "Çay, iç de git", "spans": [[0, 4], [4, 5], [6, 9], [10, 12], [13, 16]]}
WORDS = "strides\tstride s\t6\texact\t100\tdev\nevler\tev ler\t2\texact\t100\tdev\n"


@pytest.fixture(scope="module")
def model():
    end = stage("t1 t1", 26, **MLP_END)
    return nnx.merge(*random_params(network(end, stage("t1 t1", 26), stage("t1", 26))))


@pytest.fixture(scope="module")
def cut(model):
    """A function from a text to its segmentation."""
    graph, params = split(model)
    segment = segmenter_once(graph, model.config, bos=True)
    return lambda text: segment_all(segment, params, [text])[0]


def report_of(model, monkeypatch, capsys, *argv):
    with monkeypatch.context() as m:
        m.setattr(jax, "jit", quick_jit)
        m.setattr(boundaries, "segmenter", segmenter_once)
        m.setattr(boundaries, "load", lambda path, **_: model)
        m.setattr(sys, "argv", ["boundaries", "--checkpoint", "none", *map(str, argv)])
        boundaries.main()
    return capsys.readouterr().out


def test_the_report_says_what_the_chunks_are(model, cut, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "a.jsonl", tmp_path / "b.words.tsv"]
    files[0].write_text(json.dumps(UD) + "\n")
    files[1].write_text(WORDS)
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("evler\tev ler\nde\n")
    options = ["--gold", *files, "--lexicon", lexicon, "--json", "True"]
    out = json.loads(report_of(model, monkeypatch, capsys, *options))
    text = UD["text"].encode()
    found = cut(text)
    assert any(len(s.starts) > 1 for s in found.stages)
    ud = out["files"][str(files[0])]
    assert (ud["texts"], ud["bytes"]) == (1, len(text))
    for stage_out, stage_found in zip(ud["stages"], found.stages, strict=True):
        cuts = set(stage_found.starts[1:])
        gold = {a for a, _ in UD["spans"] if a}
        learned = stage_out["gold"]["words"]["learned"]
        assert learned["recall"] == len(cuts & gold) / len(gold)
        assert learned["precision"] == (len(cuts & gold) / len(cuts) if cuts else 0)
        edges = [*stage_found.starts, len(text)]
        lengths = [b - a for a, b in zip(edges, edges[1:])]
        assert stage_out["chunk_bytes"]["mean"] == pytest.approx(np.mean(lengths))
        assert stage_out["chunks"]["occurrences"] == len(lengths)
        inside = sum(0x80 <= text[c] < 0xC0 for c in cuts)
        assert stage_out["utf8_split_frac"] == (inside / len(cuts) if cuts else 0)
        chunks = [
            text[a:b].decode(errors="replace").strip().lower() for a, b in zip(edges, edges[1:])
        ]
        known = sum(chunk in ("evler", "de") for chunk in chunks)
        assert stage_out["lexicon"]["words"]["occurrences"] == known / len(chunks)
    assert out["files"][str(files[1])]["stages"][0]["gold"].keys() == {"characters", "morphemes"}


def test_enrichment_pairs_a_boundary_with_the_byte_after_the_one_that_decided(cut):
    """A START boundary decides at its own byte, an END one at the byte before its chunk."""
    text = b"abcdefg"
    found = cut(text)
    cuts = found.boundaries(0)
    surprisal = np.arange(1.0, 8.0) ** 2
    config = boundaries.BoundariesConfig("none", ())
    for alignment, shift in (("start", 1), ("end", 0)):
        report = boundaries.stage_report([found], [surprisal], 0, alignment, config, None)
        after_cuts = [surprisal[c + shift] for c in cuts if c + shift < len(text)]
        assert report["enrichment"]["bq"] == pytest.approx(
            np.mean(after_cuts) / surprisal[1:].mean()
        )
        assert math.isfinite(report["enrichment"]["null_mean"])


def test_tables_name_every_kind(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(UD) + "\n")
    out = report_of(model, monkeypatch, capsys, "--gold", tmp_path / "a.jsonl")
    for word in ("words", "word_ends", "characters", "whitespace", "Bq", "1 text, 16 bytes"):
        assert word in out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "plain", "no known form"),
        ("a.jsonl", '{"text": "plain"}', "no known form"),
        ("a.jsonl", '{"text": "", "spans": []}', "no text that can be used"),
        ("a.words.tsv", "went\tgo ed\t-\tnone\n", "no text that can be used"),
    ],
)
def test_files_without_gold_are_refused(model, tmp_path, monkeypatch, capsys, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        report_of(model, monkeypatch, capsys, "--gold", tmp_path / name)
