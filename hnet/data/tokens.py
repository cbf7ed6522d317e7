"""The same documents as tokens of a byte-level BPE, for token models beside byte models.

Ids 0 to 255 stay bytes, BOS and EOS among them; a token of several bytes has an id from 256 on. So
a token model differs from a byte model in its vocabulary alone. Every id stands for a fixed number
of bytes, by which its scores are counted: bits per BYTE of the text, never per token.
"""

import os
import re
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from hnet.data.stores import Spool
from hnet.errors import ConfigError

BYTES = 256
_PART = 1 << 20  # bytes of a document that are encoded together


class Vocabulary:
    """The tokens of a tokenizer.json. Raises ConfigError if it is none, or not byte-level."""

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(os.fspath(path))
        except ImportError:
            raise ConfigError(
                f"data.tokenizer={path!r}: the library tokenizers is not installed: "
                "pip install 'hnet-jax[bpe]'"
            ) from None
        except Exception as e:  # the library raises nothing more specific
            raise ConfigError(f"data.tokenizer={path!r} cannot be read: {e}") from None
        self.path = path
        byte_of = _byte_alphabet()
        tokens = self._tokenizer.get_vocab()
        size = max(tokens.values()) + 1
        self._id_T = np.full(size, -1, np.int32)  # of each token of the tokenizer; -1: cannot be
        lengths = [1] * BYTES
        for token, number in sorted(tokens.items(), key=lambda item: item[1]):
            if len(token) == 1 and token in byte_of:
                self._id_T[number] = byte_of[token]
            elif byte_of.keys() >= set(token):
                self._id_T[number] = len(lengths)
                lengths.append(len(token))
        self.bytes_V = np.array(lengths, np.int32)
        """bytes that each id stands for"""

    @property
    def size(self) -> int:
        """Ids in use, which `model.vocab_size` must hold."""
        return len(self.bytes_V)

    def encode(self, data: bytes) -> np.ndarray:
        """int32 ids of a text. Raises ConfigError unless they stand for exactly its bytes."""
        try:
            found = self._tokenizer.encode(data.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError as e:
            raise ConfigError(
                f"data.tokenizer={self.path!r}: a document is not UTF-8 ({e}): leave it out"
            ) from None
        ids = self._id_T[np.array(found, np.int64)]
        if (ids < 0).any() or int(self.bytes_V[ids].sum()) != len(data):
            raise ConfigError(
                f"data.tokenizer={self.path!r} changes the text: use a byte-level BPE without a "
                "normalizer, a prefix space or tokens for what is unknown"
            )
        return ids


@lru_cache(maxsize=4)
def read_vocabulary(path: str) -> Vocabulary:
    return Vocabulary(path)


def _byte_alphabet() -> dict[str, int]:
    """Character that byte-level BPE writes for each byte -> the byte (the table of GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(BYTES) if b not in shown]
    return {chr(b): b for b in shown} | {chr(BYTES + i): b for i, b in enumerate(hidden)}


class TokenDocuments:
    """Documents as ids, which are kept in a temporary file; stands in for `Documents`.

    Long documents are encoded in parts, divided where a line or a word begins.
    """

    def __init__(self, documents, vocabulary: Vocabulary):
        self.name, self.bytes_V = documents.name, vocabulary.bytes_V
        self._spool, lengths = Spool(), array("q")
        for d in range(len(documents)):
            length = 0
            for text in _parts(documents, d):
                ids = vocabulary.encode(text)
                self._spool.write(ids.tobytes())
                length += len(ids)
            lengths.append(length)
        self.length_D = np.array(lengths, np.int64)
        self._starts_D = np.cumsum(self.length_D) - self.length_D
        self._file = self._spool.reader()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs; the file ends with the process that wrote it."""
        return self.__dict__ | {"_spool": None}

    def __len__(self) -> int:
        return len(self.length_D)

    def read(self, d: int, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of document d."""
        first, size = int(self._starts_D[d]) + start, np.dtype(np.int32).itemsize
        return np.frombuffer(self._file.read(first * size, (stop - start) * size), np.int32)


def _parts(documents, d: int) -> Iterator[bytes]:
    start, length = 0, int(documents.length_D[d])
    while start < length:
        text = documents.read(d, start, min(start + _PART, length)).tobytes()
        if start + len(text) < length:
            text = text[: _begin_of_word(text)]
        yield text
        start += len(text)


def _begin_of_word(text: bytes) -> int:
    """The last place inside a text where a line begins, else a word, else a character."""
    for begin in (rb"\n(?=\S)", rb"(?<=\S)(?= \S)"):
        ends = [found.end() for found in re.finditer(begin, text)]
        if ends:
            return ends[-1]
    return len(text) - next(n for n in range(1, 5) if n == 4 or text[-n] & 0xC0 != 0x80)
