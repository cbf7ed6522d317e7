"""Token boundaries of tokenizers, in bytes."""

import pytest

from hnet.data.tokenizers.bpe import read_tokenizer, token_starts, train_bpe
from hnet.errors import ConfigError

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["the cat, the hat. да да", "日本の日本 🙂 the", "", "a"]


def test_byte_level_tokens_start_where_their_bytes_do(tmp_path):
    tokenizer = train_bpe([t.encode() for t in TEXTS] * 3, 300)
    for text in TEXTS:
        data = text.encode()
        starts = token_starts(tokenizer, data)
        tokens = tokenizer.encode(text).tokens
        assert len(starts) == len(tokens) and starts == sorted(set(starts))
        pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
        assert b"".join(pieces) == data
        alphabet = {len(token): len(piece) for token, piece in zip(tokens, pieces)}
        assert all(written == read for written, read in alphabet.items())
    assert token_starts(tokenizer, b"the the") == [0, 3]
    tokenizer.save(str(tmp_path / "t.json"))
    again = read_tokenizer(tmp_path / "t.json")
    assert token_starts(again, TEXTS[0].encode()) == token_starts(tokenizer, TEXTS[0].encode())


def test_tokens_of_other_kinds_by_their_characters():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"да": 0, "日": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Digits(True)]
    )
    assert token_starts(words, "да 日 12".encode()) == [0, 5, 9, 10]
    by_bytes = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {"<0xE6>": 0, "<0x97>": 1, "<0xA5>": 2, "a": 3}, [], byte_fallback=True
        )
    )
    assert token_starts(by_bytes, "a日a".encode()) == [0, 1, 2, 3, 4]


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    for call, says in (
        (lambda: read_tokenizer(tmp_path / "t.json"), "t.json.*cannot be read"),
        (lambda: train_bpe([b"a"], 100), "bpe=100"),
        (lambda: train_bpe([b"\xff"], 300), "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
