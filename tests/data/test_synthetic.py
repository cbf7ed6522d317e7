"""Synthetic text: the boundaries it claims, and the entropy it claims."""

import math

import numpy as np
import pytest

from hnet.data import DataConfig, eval_batches, open_part
from hnet.data.synthetic import SCRIPTS, MarkovSource, documents, synthesize
from hnet.errors import ConfigError


@pytest.mark.parametrize("script", SCRIPTS)
def test_boundaries(script):
    text = synthesize(script, 3001, seed=5)
    assert len(text.data) >= 3001
    assert set(text.word_starts) <= set(text.morpheme_starts)
    words = [text.data[a:b] for a, b in zip(text.word_starts, text.word_starts[1:])]
    morphemes = np.split(np.frombuffer(text.data, np.uint8), text.morpheme_starts[1:])
    separator = SCRIPTS[script].separator.encode()
    assert all(w.endswith(separator) and w.count(b" ") == len(separator) for w in words)
    assert len({m.tobytes().strip() for m in morphemes}) <= 200
    assert len(set(words)) < len(words)
    for word in words:
        assert set(word.decode()) <= set(SCRIPTS[script].alphabet + SCRIPTS[script].separator)


def test_scripts_cover_all_character_widths():
    widths = {len(character.encode()) for s in SCRIPTS.values() for character in s.alphabet}
    assert widths == {1, 2, 3, 4}


def test_seeded():
    assert synthesize("greek", 500, seed=1).data == synthesize("greek", 500, seed=1).data
    assert synthesize("greek", 500, seed=1).data != synthesize("greek", 500, seed=2).data


def test_corpus_by_name():
    texts = dict(documents("synthetic:latin:9001"))
    assert 9001 <= sum(map(len, texts.values())) < 9100
    assert len(texts) == len(set(texts.values())) == 3
    for name in ("synthetic:klingon", "synthetic:latin:0", "synthetic:latin:many", "synthetic:"):
        with pytest.raises(ConfigError, match="synthetic"):
            list(documents(name))


@pytest.mark.parametrize("num_symbols", [2, 3, 7])
def test_markov_source(num_symbols):
    source = MarkovSource(num_symbols)
    assert source.entropy == 2 - 2.0 ** (2 - num_symbols)
    data = source.sample(20_011, seed=3)
    table = source.log2_transitions()
    assert np.allclose(np.exp2(table[97 : 97 + num_symbols]).sum(-1), 1)
    expected = [-math.log2(num_symbols)] + [table[a, b] for a, b in zip(data, data[1:])]
    np.testing.assert_array_equal(source.log2_prob(data), expected)
    assert abs(-np.mean(expected) - source.entropy) < 0.02
    assert source.sample(0, seed=3) == b"" and len(source.log2_prob(b"")) == 0


@pytest.mark.parametrize("bos_eos", [True, False])
def test_bits_per_byte_of_the_true_model_are_exact(tmp_path, bos_eos):
    """Through files, packing and batches the code length of the true model arrives unchanged."""
    source = MarkovSource(4)
    texts = [source.sample(n, seed=n) for n in (1, 613, 2, 1009, 97)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    config = DataConfig(files=(f"{tmp_path}/*.txt",), seq_len=31, batch_size=3, bos_eos=bos_eos)
    part = open_part(config.files)
    log2_prob = source.log2_transitions()
    log2_prob[254, 97:101] = -2  # the first byte of a document is uniform
    bits = scored = 0
    for batch in eval_batches(part, config):
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        bits -= log2_prob[ids[:, :-1], ids[:, 1:]][mask].sum()
        scored += mask.sum()
    first = 0 if bos_eos else 1
    assert scored + part.unscored_bytes(config) == part.num_bytes == sum(map(len, texts))
    assert bits == -sum(source.log2_prob(t)[first:].sum() for t in texts)
