"""The default corpus."""

import bz2
import gzip
import lzma

import pytest

from hnet.data import DataConfig, open_corpus, pythondocs
from hnet.errors import ConfigError


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(DataConfig())


def paragraphs(texts):
    """Paragraphs that are long enough to be memorized, without the headings."""
    for text in texts:
        for paragraph in text.decode().split("\n\n"):
            if len(paragraph) > 200:
                yield paragraph.partition("\n")[2]


def test_is_prose_of_a_useful_size(corpus):
    text = b"".join(corpus.train.texts())
    assert 1_000_000 < len(text) < 4_000_000
    letters = sum(chr(b).isalpha() or b in b" \n" for b in text[::97])
    assert letters > 0.85 * len(text[::97])
    text.decode()


def test_held_out_part_is_fixed_varied_and_not_trained_on(corpus):
    heldout = list(corpus.heldout.texts())
    assert 65_000 < corpus.heldout.num_bytes <= 65_536
    assert len(heldout) >= 8
    trained = set(paragraphs(corpus.train.texts()))
    held = list(paragraphs(heldout))
    assert len(held) > 50
    assert trained.isdisjoint(held)
    joined = b"".join(heldout)
    for compressed in (gzip.compress(joined), bz2.compress(joined), lzma.compress(joined)):
        assert 2 < 8 * len(compressed) / len(joined) < 4  # neither boilerplate nor noise


def test_the_same_every_time(corpus, monkeypatch, tmp_path):
    pages = dict(pythondocs.parsed_documents())
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    parse = lambda: iter(pages.items())
    monkeypatch.setattr(pythondocs, "parsed_documents", parse)
    assert dict(pythondocs.documents()) == pages  # parsed, then kept
    monkeypatch.setattr(pythondocs, "parsed_documents", lambda: 1 / 0)
    assert dict(pythondocs.documents()) == pages  # as kept
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(ZeroDivisionError):  # damaged: parsed again
        pythondocs.documents()
    whole = {}
    for part in (corpus.train, corpus.heldout):
        for d, text in enumerate(part.texts()):
            name = part.document_name(d)
            whole[name] = whole.get(name, b"") + text
    assert whole == pages
    assert all(name.startswith("python:") for name in pages)
    assert max(map(len, pages.values())) < 20_000


def test_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(pythondocs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="name text files with --data.files"):
        list(pythondocs.documents())
