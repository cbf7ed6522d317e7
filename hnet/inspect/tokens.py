"""Where tokenizers cut, in bytes (the extra `fairness` brings the library)."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnet.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "tokenizers are read by a library that is not installed: "
            "pip install 'hnet-jax[fairness]'"
        ) from None
    return tokenizers


def train_bpe(texts: Sequence[bytes], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE (split first as GPT-2 does) learned from texts."""
    lib = _library()
    if vocab_size < 256:
        raise ConfigError(f"bpe={vocab_size} cannot hold every byte: use 256 or more")
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_text(data) for data in texts), trainer)
    return tokenizer


def read_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """A tokenizer.json. Raises ConfigError if it is none."""
    try:
        return _library().Tokenizer.from_file(os.fspath(path))
    except ConfigError:
        raise
    except Exception as e:  # the library raises nothing more specific
        raise ConfigError(f"tokenizer={os.fspath(path)!r} cannot be read: {e}") from None


def token_starts(tokenizer: "Tokenizer", data: bytes) -> list[int]:
    """Byte offsets at which the tokens of a text start, one for each token, increasing.

    Tokens that share one character (bytes of it) start one byte after the other. Raises
    ConfigError for text that is not UTF-8.
    """
    text = _text(data)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    lengths = _byte_lengths(encoded.tokens)
    if lengths is not None and sum(lengths) == len(data):
        return np.cumsum([0, *lengths[:-1]]).tolist() if data else []
    byte_of = np.cumsum([0, *(len(c.encode()) for c in text)])
    starts: list[int] = []
    for begin, end in encoded.offsets:
        start = int(byte_of[begin])
        if starts and start <= starts[-1]:
            start = starts[-1] + 1
        if begin < end and start < len(data):
            starts.append(start)
    return starts


def _byte_lengths(tokens: Sequence[str]) -> list[int] | None:
    """Bytes of each token if it is written a character a byte, as byte-level tokenizers do."""
    alphabet = set(_library().pre_tokenizers.ByteLevel.alphabet())
    return [len(t) for t in tokens] if alphabet.issuperset("".join(tokens)) else None


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"a text is not UTF-8 ({e}), so no tokenizer takes it") from None
