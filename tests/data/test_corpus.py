"""Opening text and splitting it into training and held-out parts."""

import os
from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hnet.data import DataConfig, open_corpus, open_part
from hnet.data.corpus import _divide
from hnet.data.documents import Part
from hnet.errors import ConfigError
from tests.data_helpers import jsonl, make_documents


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pieces(part):
    return {part.document_name(d): text for d, text in enumerate(part.texts())}


@pytest.fixture
def many(tmp_path):
    texts = [f"document {i} " * (3 + i * 7 % 11) for i in range(101)]
    return write(tmp_path / "many", {"a.jsonl": jsonl(texts), "b.txt": b"one file " * 40})


def test_division_by_hash(many):
    config = DataConfig(files=(f"{many}/*",), eval_fraction=0.2)
    corpus = open_corpus(config)
    whole = pieces(open_part(config.files))
    train, heldout = pieces(corpus.train), pieces(corpus.heldout)
    assert corpus.num_bytes == sum(map(len, whole.values()))
    assert corpus.heldout.num_bytes == int(0.2 * corpus.num_bytes)
    (cut,) = train.keys() & heldout.keys()  # the last one taken
    assert train[cut] + heldout[cut] == whole[cut]
    for name in whole.keys() - {cut}:
        assert whole[name] == (train.get(name) or heldout[name])
    assert len(heldout) > 10


def test_division_does_not_depend_on_the_folder(many, tmp_path):
    (tmp_path / "copy").mkdir()
    copy = write(tmp_path / "copy", {p.name: p.read_bytes() for p in many.iterdir()})
    first = open_corpus(DataConfig(files=(f"{many}/*",)))
    again = open_corpus(DataConfig(files=(f"{copy}/*",)))
    assert list(first.heldout.texts()) == list(again.heldout.texts())
    assert first.fingerprint == again.fingerprint


def test_fingerprint_sees_every_byte_every_document_and_the_division(many):
    config = DataConfig(files=(f"{many}/*",))
    seen = {open_corpus(config).fingerprint}
    seen.add(open_corpus(replace(config, eval_fraction=0.3)).fingerprint)
    text = (many / "b.txt").read_bytes()
    (many / "b.txt").write_bytes(text[:-1] + b"!")
    seen.add(open_corpus(config).fingerprint)
    (many / "b.txt").write_bytes(text[:-9])
    (many / "c.txt").write_bytes(text[-9:])  # the same bytes as two documents
    seen.add(open_corpus(config).fingerprint)
    assert len(seen) == 4


@given(
    st.lists(st.text(min_size=1, max_size=30).map(str.encode), min_size=1, max_size=12),
    st.floats(0, 0.9),
)
def test_any_division_loses_nothing_and_splits_no_character(texts, share):
    whole = Part((make_documents(texts),))
    train, heldout = _divide(whole, share)
    parts = Counter()
    for part in (train, heldout):
        for d, text in enumerate(part.texts()):
            text.decode()
            parts[int(part.documents[0].number_D[d])] += len(text)
    assert parts == Counter({i: len(t) for i, t in enumerate(texts)})
    wanted = max(1, int(share * whole.num_bytes)) if share else 0
    assert abs(heldout.num_bytes - wanted) <= 3
    assert (heldout.num_bytes > 0) == (share > 0)


def test_one_file_is_divided_at_its_end(tmp_path):
    text = bytes(i * i % 251 for i in range(5000))
    write(tmp_path, {"book.bin": text})
    config = DataConfig(files=(f"{tmp_path}/book.bin",), eval_fraction=0.5, eval_max_bytes=300)
    corpus = open_corpus(config)
    assert b"".join(corpus.train.texts()) + b"".join(corpus.heldout.texts()) == text
    assert 297 <= corpus.heldout.num_bytes <= 300
    assert corpus.heldout.document_name(0) == f"{tmp_path}/book.bin"
    assert corpus.heldout.document_bytes(0) == corpus.heldout.num_bytes


def test_nothing_held_out(many):
    corpus = open_corpus(DataConfig(files=(f"{many}/*",), eval_fraction=0))
    assert corpus.heldout.num_bytes == corpus.heldout.num_documents == 0


def test_eval_files_are_not_trained_on_by_the_name_of_a_link(tmp_path):
    (tmp_path / "held").write_bytes(b"held out" * 20)
    (tmp_path / "text").write_bytes(b"trained on" * 20)
    os.link(tmp_path / "held", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("held")
    files = {name: (str(tmp_path / name),) for name in ("held", "text", "hard", "soft")}
    for name in ("hard", "soft"):
        config = DataConfig(files["text"] + files["held"], eval_files=files[name], seq_len=9)
        with pytest.raises(ConfigError, match="are in data.eval_files too"):
            open_corpus(config)
    (tmp_path / "soft").unlink()
    config = DataConfig((f"{tmp_path}/*",), eval_files=files["hard"], seq_len=9)
    assert open_corpus(config).train.num_bytes == 200


def test_eval_files_are_never_trained_on(many):
    config = DataConfig(files=(f"{many}/*",), eval_files=(f"{many}/../many/b.txt",))
    corpus = open_corpus(config)
    assert list(corpus.heldout.texts()) == [b"one file " * 40]
    assert all(":" in name for name in pieces(corpus.train))
    assert corpus.train.num_documents == 101


def test_long_lists_are_not_printed(many):
    with pytest.raises(ConfigError) as e:
        DataConfig(files=("a",) * 300, weights=(1.0,) * 299)
    assert "299 numbers" in str(e.value) and len(str(e.value)) < 200


def test_without_weights_globs_are_one_text(many):
    joined = open_corpus(DataConfig(files=(f"{many}/a*", f"{many}/b*"), eval_fraction=0))
    assert joined.train.source_names == ("all",)
    assert joined.train.document_name(100) == f"{many}/a.jsonl:101"
    assert joined.train.document_name(101) == f"{many}/b.txt"
    assert list(joined.train.texts()) == list(open_part((f"{many}/*",)).texts())


def test_with_weights_each_source_is_divided(many):
    config = DataConfig(files=(f"{many}/a*", "synthetic:greek:9000"), weights=(1, 2), seq_len=97)
    corpus = open_corpus(config)
    assert corpus.train.source_names == corpus.heldout.source_names == config.files
    for train, heldout in zip(corpus.train.documents, corpus.heldout.documents):
        assert abs(heldout.num_bytes - 0.05 * (heldout.num_bytes + train.num_bytes)) < 4
    assert corpus.train.document_name(corpus.train.num_documents - 1).startswith("synthetic:greek")


def test_empty_documents_are_left_out(tmp_path):
    write(tmp_path, {"a.txt": b"", "b.jsonl": jsonl(["", "x", "", "y"])})
    assert list(open_part((f"{tmp_path}/*",)).texts()) == [b"x", b"y"]


@pytest.mark.parametrize(
    ("contents", "settings", "message"),
    [
        ({}, {}, "matches no file"),
        ({"a.txt": b""}, {}, "the corpus is empty"),
        ({"a.txt": b"x"}, {}, "leaves 0 bytes to train on"),
        ({"a.txt": b"x" * 500}, {}, "data.seq_len=512"),
        ({"a.txt": b"x" * 999}, {"files": ("a.txt", "*.txt")}, "matched by 'a.txt' and by"),
        ({"a.txt": b"x" * 999}, {"eval_files": ("*.txt",)}, "are in data.eval_files too"),
        ({"a.txt": b"x" * 999}, {"eval_files": ("b.txt",)}, "data.eval_files: 'b.txt' matches no"),
        ({"a.txt": b"x" * 999, "b": b""}, {"eval_files": ("b",)}, "holds no byte"),
        ({"a.array_record": b"", "b.txt": b"x"}, {"files": ("*",)}, "mixes shards with text"),
        ({"a.txt": b"x" * 999, "b.txt": b"x"}, {"weights": (1, 1), "files": ("a*", "b*")}, "'b*'"),
        ({}, {"files": ("python:",), "eval_files": ("python:",)}, "is trained on by"),
        ({}, {"files": ("synthetic:dna",), "eval_files": ("synthetic:dna:9",)}, "is trained on"),
    ],
)
def test_bad_corpora(tmp_path, monkeypatch, contents, settings, message):
    monkeypatch.chdir(write(tmp_path, contents))
    with pytest.raises(ConfigError) as e:
        open_corpus(DataConfig(**({"files": ("*.txt",)} | settings)))
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"seq_len": 1},
        {"eval_fraction": 1.0},
        {"eval_fraction": float("nan")},
        {"eval_max_bytes": 0},
        {"num_workers": -1},
        {"prefetch_batches": 0},
        {"weights": (1.0, 2.0)},
        {"weights": (0.0,)},
        {"weights": (float("inf"),)},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}="):
        DataConfig(**settings)


def test_the_first_documents_up_to_a_number_of_bytes(tmp_path):
    texts = {"a": "abc", "b": "dé", "c": "xyz"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    part = open_part((f"{tmp_path}/*",))
    found = {most: b"".join(part.beginning(most)).decode() for most in range(10)}
    whole = "abcdéxyz"
    assert [found[m] for m in (0, 3, 4, 5, 6, 7, 9)] == [
        "", "abc", "abcd", "abcd", "abcdé", "abcdéx", whole
    ]  # fmt: skip
