"""Tokens of a byte-level BPE instead of bytes: same text, same bytes to score."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hnet.config import BOS_ID, EOS_ID
from hnet.data import DataConfig, eval_batches, open_corpus, train_batches
from hnet.data.packing import Stream
from hnet.data.tokens import TokenDocuments, Vocabulary
from hnet.errors import ConfigError
from hnet.loss import scored_bytes
from hnet.train.compiled_run import check_vocabulary
from hnet.train.evaluate import Evaluation
from tests.data_helpers import make_documents
from tests.training import TINY, tiny_run

TEXTS = ["the cat sat on the mat; ", "die Katze saß auf der Matte — ", "кот сидел на коврике 猫 "]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text * 3 for text in TEXTS], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def bytes_of(vocabulary, path):
    """Id -> its bytes, from the tokenizer's own decoder."""
    library = Tokenizer.from_file(path)
    for token, number in library.get_vocab().items():
        text = library.decoder.decode([token])
        yield int(vocabulary._id_T[number]), text.encode()


def test_ids_stand_for_their_bytes_and_single_bytes_keep_their_value(file):
    vocabulary = Vocabulary(file)
    assert vocabulary.size == 280
    table = dict(bytes_of(vocabulary, file))
    for number, data in table.items():
        if "�".encode() not in data:  # a token that ends inside a character
            assert vocabulary.bytes_V[number] == len(data)
            assert number > 255 or data == bytes([number])
    for text in TEXTS:
        ids = vocabulary.encode(text.encode())
        assert (ids > 255).any() and BOS_ID not in ids and EOS_ID not in ids
        assert vocabulary.bytes_V[ids].sum() == len(text.encode())


def test_rows_of_tokens_are_packed_like_rows_of_bytes(file):
    vocabulary, texts = Vocabulary(file), [text.encode() for text in TEXTS]
    documents = TokenDocuments(make_documents(texts), vocabulary)
    stream = Stream(documents, seq_len=7, bos_eos=True)
    expected = [i for t in texts for i in (BOS_ID, *vocabulary.encode(t), EOS_ID)]
    rows = [stream.row(r) for r in range(stream.num_rows)]
    got = [int(i) for row in rows for i in row.input_ids[1:]]
    assert got[: len(expected) - 1] == expected[1:]
    scored = sum(int(vocabulary.bytes_V[row.input_ids[row.loss_mask]].sum()) for row in rows)
    assert scored == sum(map(len, texts))


def test_bits_are_counted_per_byte_of_the_same_held_out_text(file):
    config = DataConfig(("synthetic:latin",), seq_len=32, batch_size=4, eval_max_bytes=600)
    tokens, corpus = replace(config, tokenizer=file), open_corpus(config)
    heldout = open_corpus(tokens).heldout
    assert list(heldout.texts()) == list(corpus.heldout.texts())
    counts = []
    for data in (config, tokens):
        evaluation, positions = Evaluation(), 0
        for batch in eval_batches(heldout, data):
            nll = np.ones(batch["input_ids"].shape, np.float32)
            evaluation.add(batch, {"nll_BL": nll, "positions": 0, "num_chunks_S": []})
            positions += int(batch["loss_mask"].sum())
        assert evaluation.num_bytes == heldout.num_bytes
        counts.append(positions)
        assert evaluation.nats == positions  # one nat per position, for any token
    assert counts[1] < counts[0] == heldout.num_bytes
    with train_batches(open_corpus(tokens), tokens, seed=0) as batches:
        batch = next(batches)
    lengths = batch["byte_lengths"][batch["loss_mask"]]
    assert lengths.max() > 1 and scored_bytes({k: jnp.asarray(v) for k, v in batch.items()}) == (
        lengths.sum()
    )


@pytest.mark.parametrize("bos_eos", [True, False])
def test_sources_of_a_mixture_are_counted_in_bytes(file, tmp_path, bos_eos):
    for name, text in zip("abc", TEXTS):
        (tmp_path / f"{name}.txt").write_text(text * 9)
    config = DataConfig(
        tuple(f"{tmp_path}/{name}.txt" for name in "abc"), weights=(1, 2, 1), seq_len=13,
        batch_size=4, tokenizer=file, bos_eos=bos_eos, eval_fraction=0,
    )  # fmt: skip
    corpus, counted, scored = open_corpus(config), np.zeros(3, np.int64), 0
    with train_batches(corpus, config, seed=0) as batches:
        for k in range(9):
            batch = next(batches)
            scored += int(batch["byte_lengths"][batch["loss_mask"]].sum())
            counted += batches.source_bytes(k)
    assert counted.sum() == scored
    assert (counted > 0).all()


def test_what_cannot_be_a_vocabulary_is_one_line(file, tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer='none.json' cannot be read"):
        Vocabulary("none.json")
    config = tiny_run(tmp_path, data=DataConfig(("synthetic:latin",), tokenizer=file))
    with pytest.raises(ConfigError, match="model.vocab_size=256: data.tokenizer=.*needs 280"):
        check_vocabulary(config)
    check_vocabulary(replace(config, model=replace(TINY, vocab_size=280)))
    lower = Tokenizer.from_file(file)
    lower.normalizer = normalizers.Replace("t", "")
    lower.save(str(tmp_path / "lower.json"))
    with pytest.raises(ConfigError, match="changes the text"):
        Vocabulary(str(tmp_path / "lower.json")).encode(b"the cat")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Vocabulary(file).encode(b"\xff")
    with pytest.raises(ConfigError, match="route_groups: scripts are told apart in bytes"):
        next(eval_batches(open_corpus(config.data).heldout, config.data, route_groups=[["Latin"]]))
