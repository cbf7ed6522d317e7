"""Boundary labels from the cuts of a tokenizer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hnet.data import DataConfig, open_corpus, train_batches
from hnet.data.identity import inputs
from hnet.data.labels import Cuts, RowLabels, unigram
from hnet.data.packing import Stream
from hnet.errors import ConfigError
from tests.data_helpers import make_documents
from tests.golden_data import FOLDER


class Pieces:
    """Stands for a `tokenizers.Tokenizer`: the stored pieces of each word."""

    def __init__(self, pieces_of_word):
        self.pieces = pieces_of_word

    def encode(self, word, add_special_tokens):
        assert not add_special_tokens
        ends = np.cumsum([len(piece.removeprefix("▁")) for piece in self.pieces[word]]).tolist()
        return SimpleNamespace(offsets=list(zip([0, *ends], ends)))


def test_cuts_are_those_of_dynamic_pooling():
    """Its code shifts the cuts inside the first word of a row by one character."""
    told = json.loads((FOLDER / "family" / "dtp_rules.json").read_text())
    for row, expected in zip(told["rows"], told["unigram_boundaries"], strict=True):
        found = np.flatnonzero(Cuts(Pieces(told["pieces_of_word"]))(row.encode()))
        first = row.index(" ")
        shifted = {t + (t < first) for t in found.tolist()}
        assert sorted(shifted) == expected


TEXTS = ["aä b  ccc\n", "ddd", "eeee fffff\tgg", "ää", "hh i", "jjjjjjjjjjjjjjjjjjj k"]


@pytest.mark.parametrize("bos_eos", [False, True])
@pytest.mark.parametrize("seq_len", [2, 5, 17, 500])
def test_rows_have_the_labels_of_their_documents(bos_eos, seq_len):
    """Every position has the label of its byte in the whole text; special tokens have none."""
    texts = [text.encode() for text in TEXTS] + [b"\xff\xfe \xff"]
    words = " ".join([*TEXTS, "�� �"]).split()
    cuts = Cuts(Pieces({w: [w[i : i + 2] for i in range(0, len(w), 2)] for w in words}))
    edge = [False] * bos_eos
    tokens = np.concatenate([[*edge, *cuts(text), *edge] for text in texts]).astype(bool)
    assert 20 < tokens.sum() < len(tokens) - 20
    stream = Stream(make_documents(texts), seq_len=seq_len, bos_eos=bos_eos)
    for r in range(stream.num_rows):
        (found,) = RowLabels([stream], cuts)([(0, r)], seq_len)
        expected = tokens[r * (seq_len - 1) :][:seq_len]
        assert np.array_equal(found[: len(expected)], expected), r
        assert not found[len(expected) :].any()


def test_a_run_trains_a_unigram_model_or_reads_a_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("undo redo unpack repack unfold refold " * 40)
    config = {"files": (str(text),), "seq_len": 64, "batch_size": 2}

    def batch(labels):
        data = DataConfig(labels=labels, **config)
        corpus = open_corpus(data)
        with train_batches(corpus, data, seed=3) as batches:
            return next(batches), inputs(data, corpus)

    first, read = batch("unigram:16")
    again, _ = batch("unigram:16")
    labels_BL, ids_BL = first["labels"], first["input_ids"]
    assert read["data.labels"] == "unigram:16" and labels_BL.dtype == bool
    assert np.array_equal(labels_BL, again["labels"])
    assert np.all(labels_BL[ids_BL == 0x20])
    assert labels_BL[(ids_BL != 0x20) & (ids_BL < 254)].mean() > 0.1, "words have cuts inside"
    tokenizer = unigram([text.read_text()], 16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other, read = batch(str(tmp_path / "tokenizer.json"))
    assert np.array_equal(other["labels"], labels_BL) and len(read["data.labels"]) == 16
    for wrong, says in (
        ("unigram:x", "use e.g. 'unigram:10000'"),
        (str(text), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            batch(wrong)
    with pytest.raises(ConfigError, match="labels are for bytes"):
        DataConfig(labels="unigram:9", tokenizer="t.json")
