"""Token boundaries of tokenizers, as byte offsets (the extra `fairness` installs the library)."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hnet.errors import ConfigError
from hnet.files import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_TOKENS = 1 << 20


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
    """Train a byte-level BPE on texts, with the pre-tokenization of GPT-2."""
    lib = _library()
    if not 256 <= vocab_size <= MOST_TOKENS:  # the library reserves memory for all of them
        raise ConfigError(f"bpe={vocab_size}: use 256, which hold every byte, to {MOST_TOKENS}")
    return learned(lib.models.BPE(), lib.trainers.BpeTrainer, texts, vocab_size)


def learned(model, trainer: type, texts: Sequence[bytes], vocab_size: int) -> "Tokenizer":
    """A tokenizer over bytes with this model, learned by a trainer of the library."""
    lib = _library()
    tokenizer = lib.Tokenizer(model)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    own = trainer(vocab_size=vocab_size, **options)
    tokenizer.train_from_iterator((_text(data) for data in texts), own)
    return tokenizer


def read_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """Read a tokenizer.json. Raises ConfigError if the file cannot be read as one."""
    try:
        found = _library().Tokenizer.from_buffer(read_bytes(path))
    except ConfigError:
        raise
    except Exception as e:  # the library raises nothing more specific
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"tokenizer={os.fspath(path)!r} cannot be read: {reason}") from None
    if not found.get_vocab_size():
        raise ConfigError(f"tokenizer={os.fspath(path)!r} has no tokens")
    return found


def token_starts(tokenizer: "Tokenizer", data: bytes) -> list[int]:
    """Byte offsets at which the tokens of a text start, one per token, increasing.

    If several tokens share one character, each starts one byte after the one before. Raises
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
    """Number of bytes per token, for tokenizers that write one character per byte; else None."""
    alphabet = set(_library().pre_tokenizers.ByteLevel.alphabet())
    return [len(t) for t in tokens] if alphabet.issuperset("".join(tokens)) else None


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"a text is not UTF-8 ({e}), so no tokenizer takes it") from None
