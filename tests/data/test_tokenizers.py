"""Tokenizers learned from text, and the one that a run learns into its work directory."""

import random
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.data import DataConfig
from hnet.data.identity import inputs, write_inputs
from hnet.data.tokenizers import TOKENIZERS, wanted
from hnet.data.tokenizers.equal_info import Counts, windows
from hnet.data.tokenizers.lib import Reader
from hnet.data.tokenizers.superbpe import merges_across
from hnet.data.tokens import read_vocabulary, starts
from hnet.errors import ConfigError
from hnet.train.lock import DirectoryLock
from hnet.train.tokenizer import with_tokenizer
from hnet.train.workdir import check_tokenizer, tokenizer_of
from tests.training import TINY, tiny_run

TEXTS = [b"the tree of the king and the sea of the king\n" * 9, "of the höhle\n".encode() * 5]


def slow_merges(rows, names, size):
    """BPE by loops over lists."""
    rows, found = [list(row) for row in rows], []
    numbers = {token: number for number, token in enumerate(names)}
    while len(numbers) < size:
        counts = {}
        for row in rows:
            for pair in zip(row, row[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if max(counts.values(), default=0) < 2:
            break
        best = min(pair for pair, n in counts.items() if n == max(counts.values()))
        found.append((names[best[0]], names[best[1]]))
        token = "".join(found[-1])
        number = numbers.setdefault(token, len(numbers))
        names += [token] * (number == len(names))
        for row in rows:
            i = 0
            while i < len(row) - 1:
                if (row[i], row[i + 1]) == best:
                    row[i : i + 2] = [number]
                i += 1
    return found


def test_merges_are_those_of_a_loop():
    rng = random.Random(0)
    for _ in range(40):
        rows = [[rng.randrange(3) for _ in range(rng.randrange(31))] for _ in range(3)]
        fast = list(merges_across(rows, {"a": 0, "b": 1, "c": 2}, 9))
        assert fast == slow_merges(rows, ["a", "b", "c"], 9)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in TOKENIZERS:
        (folder / kind).write_text(wanted(f"{kind}:300").train(TEXTS))
    return {kind: read_vocabulary(str(folder / kind)) for kind in TOKENIZERS}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_vocabularies_are_over_bytes_and_superwords_span_words(vocabularies, kind):
    vocabulary, text = vocabularies[kind], "\x00of the Höhle の".encode()
    ids = vocabulary.encode(text)
    assert 256 < vocabulary.size <= 300 and vocabulary.bytes_V[ids].sum() == len(text)
    assert b"".join(vocabulary.pieces[i] for i in ids) == text
    assert starts(vocabulary, text)[:2] == [0, 1]
    spans = [piece for piece in vocabulary.pieces if b" " in piece.strip(b" ")]
    assert kind in ("lib", "equal_info") or bool(spans) == (kind == "superbpe")


def test_superwords_need_fewer_tokens_than_words(vocabularies):
    counts = {kind: sum(len(v.encode(t)) for t in TEXTS) for kind, v in vocabularies.items()}
    assert counts["superbpe"] < counts["bpe"] < sum(map(len, TEXTS))


@pytest.mark.parametrize("kind", ["lib", "equal_info"])
def test_longest_matches_read_any_bytes_and_are_those_of_a_loop(vocabularies, kind):
    vocabulary, rng = vocabularies[kind], random.Random(1)
    for _ in range(10):
        text = bytes(rng.choices(b"the king of\xff\xc3", k=31))
        expected, at = [], 0
        while at < len(text):
            fits = [piece for piece in vocabulary.pieces if text[at:].startswith(piece)]
            expected.append(max(fits, key=len))
            at += len(expected[-1])
        assert [vocabulary.pieces[i] for i in vocabulary.encode(text)] == expected


def test_a_reader_prefers_what_leaves_fewer_unknown_bytes_and_chunks():
    reader = Reader()
    reader.chunks = [b"ab", b"abc", b"cd", b"d", b"e"]
    reader._known, rank = set(reader.chunks), {c: i for i, c in enumerate(reader.chunks)}
    assert reader.matches(b"abcd", 0) == (b"abc", b"ab")
    assert reader._is_worse(b"abcx", 0, (b"abc", b"ab"), rank) is False  # the c is unknown
    assert reader._is_worse(b"abcd", 0, (b"abc", b"ab"), rank) is True  # the sum of the ranks
    reader.read([b"abcd"] * 3)
    assert reader.chunks.index(b"abc") > 1


def code_of(next_bytes, size, window):
    """Number of a window, by narrowing an interval byte by byte; None if it gets none."""
    low, n = 0, size
    for k, byte in enumerate(window):
        low, n, prob = low + (k > 0), n - (k > 0), next_bytes([window[:k]])[0]
        order = sorted(range(256), key=lambda b, prob=prob: (prob[b], b))
        rank, first = order.index(byte), k == 0
        mass = np.cumsum(prob[order])
        ends = [int(m / mass[-1] * (n - 256 * first) + 1e-9) for m in (0.0, *mass)]
        low, n = low + ends[rank] + first * rank, ends[rank + 1] - ends[rank] + first
        if not n:
            return None
    return low


def test_windows_are_arithmetic_codes_of_equal_information(vocabularies):
    model, size = Counts(TEXTS), 300
    found = windows(model, size)
    numbers = [code_of(model, size, window) for window in found]
    assert sorted(numbers) == list(range(size))  # one number each
    assert set(found) == set(vocabularies["equal_info"].pieces)
    for window in found:  # a window ends only before a byte without a number
        for byte in (b"t", b"h", b" ", b"\xff"):
            if window + byte not in found:
                assert code_of(model, size, window + byte) is None
    text = b"".join(TEXTS)
    mean = len(text) / len(vocabularies["equal_info"].encode(text))
    assert mean > 1.5 and max(map(len, found)) <= 32


@given(st.binary(max_size=80))
def test_windows_are_lossless_on_any_bytes(vocabularies, data):
    vocabulary = vocabularies["equal_info"]
    assert b"".join(vocabulary.pieces[i] for i in vocabulary.encode(data)) == data


def learned(config):
    with with_tokenizer(config) as found:
        return found


def test_a_run_learns_its_tokenizer_once(tmp_path):
    data = DataConfig(("synthetic:latin",), tokenizer="bpe:270")
    model = replace(TINY, vocab_size=270)
    config = tiny_run(tmp_path / "run", data=data, model=model)
    first = learned(config)
    content = (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert read_vocabulary(first.data.tokenizer).size == 270
    assert learned(config) == first == learned(first)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    other = replace(config, data=replace(data, tokenizer="bpe:269"))
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="learned 'bpe:270': use that"):
        learned(other)
    with pytest.raises(ConfigError, match="vocab_size=256: data.tokenizer='bpe:270' needs 270"):
        learned(replace(config, model=TINY))
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    write_inputs(tmp_path / "run", inputs(first.data, None))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert tokenizer_of(moved, first.data) == str(moved / "tokenizer.json")
    check_tokenizer(moved, first.data)
    (moved / "tokenizer.json").write_text(wanted("bpe:268").train(TEXTS))
    with pytest.raises(ConfigError, match=r"data.tokenizer: .* fingerprint .*: give it the same"):
        check_tokenizer(moved, first.data)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another run"):
        learned(replace(config, workdir=str(tmp_path / "old")))


def test_a_refused_start_takes_its_tokenizer_back(tmp_path):
    data = DataConfig(("synthetic:latin",), tokenizer="bpe:260")
    config = tiny_run(tmp_path / "a" / "run", data=data, model=replace(TINY, vocab_size=270))
    with pytest.raises(ConfigError, match="no such probes"), with_tokenizer(config):
        raise ConfigError("no such probes")
    assert list(tmp_path.iterdir()) == []
    learned(config)  # the start is killed here, before its run begins
    folder = tmp_path / "a" / "run"
    (folder / "tokenizer.json").unlink()  # or even before the file is whole
    other = learned(replace(config, data=replace(data, tokenizer="bpe:262")))
    assert read_vocabulary(other.data.tokenizer).size == 262
    with ExitStack() as held, pytest.raises(ConfigError, match="in use"), with_tokenizer(config):
        held.enter_context(DirectoryLock(folder))  # the start that refuses this one holds it
        raise ConfigError("in use")
    with pytest.raises(ConfigError, match="in use"), DirectoryLock(folder):
        learned(config)
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_source.json"}
    (folder / "tokenizer_source.json").write_text("[1]")
    with pytest.raises(ConfigError, match="names no tokenizer"):
        learned(config)


def test_bad_kinds_are_one_line():
    for tokenizer, says in (("bpe:12", "use 257 to"), ("unigram:x", "use 257 to")):
        with pytest.raises(ConfigError, match=says):
            wanted(tokenizer)
    with pytest.raises(ConfigError, match="learned by pretrain"):
        read_vocabulary("lib:300")
    with pytest.raises(ConfigError, match="a text is not UTF-8"):
        wanted("bpe:300").train([b"a\xff"])
