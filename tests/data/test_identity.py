"""A text is identified by its content, not by its name."""

import os
from dataclasses import replace

import pytest

from hnet.commands.evaluate import summary
from hnet.data import DataConfig, open_corpus, open_part
from hnet.data.identity import check_inputs, inputs
from hnet.errors import ConfigError
from hnet.train.evaluate import Evaluation
from tests.data_helpers import jsonl


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"text {name} " * 99)
    (tmp_path / "text" / "d.jsonl").write_bytes(jsonl([f"line {i} " * 9 for i in range(20)]))
    return tmp_path / "text"


def fingerprint(*files, **settings):
    return open_corpus(DataConfig(tuple(map(str, files)), **settings)).fingerprint


def test_another_spelling_of_the_same_text(text, tmp_path, monkeypatch):
    expected = fingerprint(f"{text}/*")
    (tmp_path / "link").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    assert fingerprint("text/*") == fingerprint("./link/../text/?.*") == expected
    assert fingerprint("link/*") == fingerprint("link/a*", "link/[b-d]*") == expected
    assert fingerprint("link/*", eval_fraction=0.05 + 1e-9) == expected
    (text / "empty.txt").write_text("")
    assert fingerprint("link/*") == expected


def test_other_text_of_the_same_name(text):
    seen = {fingerprint(f"{text}/*")}
    seen.add(fingerprint(f"{text}/*", eval_fraction=0.3))
    seen.add(fingerprint(f"{text}/[b-d]*", f"{text}/a*"))  # another order
    half = (f"{text}/[ab]*", f"{text}/[cd]*")
    seen.add(fingerprint(*half, weights=(1.0, 1.0)))
    (text / "d.jsonl").write_bytes(jsonl(["line 0 " * 9 + "line 1 " * 9]))
    seen.add(fingerprint(f"{text}/*"))
    (text / "a.txt").write_text("text A " * 99)
    os.utime(text / "a.txt", (0, 0))
    seen.add(fingerprint(f"{text}/*"))
    assert len(seen) == 6


def test_what_a_run_reads_twice(text, tmp_path):
    config = DataConfig((f"{text}/*",))
    corpus = open_corpus(config)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    read = inputs(replace(config, tokenizer=str(tokenizer)), corpus)
    check_inputs(None, read, "the run", "")
    check_inputs(read, inputs(replace(config, tokenizer=f"{tokenizer}"), corpus), "the run", "")
    tokenizer.write_text("{ }")
    changed = inputs(replace(config, tokenizer=str(tokenizer)), corpus)
    for now in (changed, inputs(config, corpus)):
        with pytest.raises(ConfigError, match="^data.tokenizer: the content .* the run read") as e:
            check_inputs(read, now, "the run", "give it back")
        assert read["data.tokenizer"] in str(e.value)
        assert now.get("data.tokenizer", "none") in str(e.value)
    tokenizer.unlink()
    with pytest.raises(ConfigError, match="tokenizer=.* cannot be read: No such file"):
        inputs(replace(config, tokenizer=str(tokenizer)), corpus)


def test_scores_are_grouped_by_file(text):
    names = ("log_12:30.txt", "log_12:45.txt", "d.jsonl:2", "d.jsonl")
    for name in names[:3]:
        (text / name).write_text(f"text of {name}")
    part = open_part((f"{text}/log*", f"{text}/d.jsonl*"))
    result = Evaluation()
    for d in range(part.num_documents):
        result.nats_by_document[d] = result.bytes_by_document[d] = part.document_bytes(d)
    report = summary(result, part)
    sizes = {name.removeprefix(f"{text}/"): row["bytes"] for name, row in report["files"].items()}
    expected = [len(f"text of {name}") for name in names[:3]]
    expected.append(sum(len(f"line {i} " * 9) for i in range(20)))
    assert sizes == dict(zip(names, expected))
    # the second line of one file is called as another file
    assert len(report["documents"]) == part.num_documents == 23
    assert sum(row["bytes"] for row in report["documents"].values()) == part.num_bytes


def test_a_text_is_scored_once(text):
    with pytest.raises(ConfigError, match="matched by .* and by"):
        open_part((f"{text}/a.txt", f"{text}/*"))
