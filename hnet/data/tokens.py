"""Documents as tokens of a byte-level BPE, to train token models as well as byte models.

Ids 0 to 255 are bytes, BOS and EOS among them; tokens of several bytes have ids from 256 on. So a
token model differs from a byte model only in its vocabulary. Every id stands for a fixed number of
bytes, so scores are reported in bits per byte of the text, never per token.
"""

import codecs
import json
import re
import unicodedata
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from hnet.data.stores import Spool
from hnet.data.tokenizers import wanted
from hnet.data.tokenizers.lib import FORMAT
from hnet.errors import ConfigError
from hnet.files import parse_json, read_bytes

BYTES = 256
_MOST_TOKENS = 1 << 24
_PART = 1 << 20  # bytes of a document encoded at a time


class Vocabulary:
    """The tokens of a tokenizer.json. Raises ConfigError if the file cannot be read."""

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_buffer(read_bytes(path))
        except ImportError:
            raise ConfigError(
                f"data.tokenizer={path!r}: the library tokenizers is not installed: "
                "pip install 'hnet-jax[bpe]'"
            ) from None
        except Exception as e:  # the library raises nothing more specific
            reason = getattr(e, "strerror", None) or e
            raise ConfigError(f"data.tokenizer={path!r} cannot be read: {reason}") from None
        self.path = path
        byte_of = _byte_alphabet()
        tokens = self._tokenizer.get_vocab()
        size = max(tokens.values(), default=-1) + 1
        if not 0 < size <= _MOST_TOKENS:
            has = f"an id of {size - 1}, use ids below {_MOST_TOKENS}" if size else "no tokens"
            raise ConfigError(f"data.tokenizer={path!r} has {has}")
        # Our id of each tokenizer token; -1: a token that is not made of bytes, such as <unk>.
        self._id_T = np.full(size, -1, np.int32)
        self.pieces = [bytes([b]) for b in range(BYTES)]
        """bytes that each id stands for"""
        for token, number in sorted(tokens.items(), key=lambda item: item[1]):
            if len(token) == 1 and token in byte_of:
                self._id_T[number] = byte_of[token]
            elif byte_of.keys() >= set(token):
                self._id_T[number] = len(self.pieces)
                self.pieces.append(bytes(byte_of[c] for c in token))
        self.bytes_V = np.array([len(piece) for piece in self.pieces], np.int32)
        """number of bytes that each id stands for"""
        self._character_of = {byte: c for c, byte in byte_of.items()}

    @property
    def size(self) -> int:
        """Number of ids in use; `model.vocab_size` must be at least this."""
        return len(self.bytes_V)

    def encode(self, data: bytes) -> np.ndarray:
        """int32 ids of a text. Raises ConfigError unless they encode exactly its bytes."""
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

    def settings(self) -> dict[str, Any]:
        """The content of the tokenizer.json."""
        return json.loads(self._tokenizer.to_str())

    def encode_beginning(self, data: bytes) -> set[tuple[int, ...]]:
        """Ids of the beginning of a text; empty for bytes with which no text begins.

        If the last character is incomplete, there may be several: it may become a letter, a number,
        white space or another one, which pre-tokenization tells apart.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError:
            return set()
        rest = decoder.getstate()[0]
        kinds = _kinds(rest) if rest else "a"
        return {self._encode_as(data, text + kind * len(rest)) for kind in kinds}

    def is_word(self, data: bytes) -> bool:
        """Whether pre-tokenization leaves these bytes, or their complete characters, undivided."""
        text = data.decode(errors="ignore")
        splitter = self._tokenizer.pre_tokenizer
        return splitter is None or len(splitter.pre_tokenize_str(text)) <= 1

    def _encode_as(self, data: bytes, text: str) -> tuple[int, ...]:
        """Ids of the data, split into words as the text is, which has as many bytes."""
        ids, start = [], 0
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            own = data[start : start + len(word)]
            start += len(word)
            spelled = "".join(map(self._character_of.__getitem__, own))
            ids += [int(self._id_T[t.id]) for t in self._tokenizer.model.tokenize(spelled)]
        return tuple(ids)


class LongestMatch:
    """Tokens of a file that `hnet.data.tokenizers` wrote, for greedy longest matches.

    It has the methods of `Vocabulary` and reads any bytes.
    """

    def __init__(self, path: str, content: dict[str, Any]):
        self.path = path
        try:
            chunks = [bytes.fromhex(token) for token in content["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"data.tokenizer={path!r} has no list of tokens in hex") from None
        if not all(len(chunk) > 1 for chunk in chunks) or len(set(chunks)) < len(chunks):
            raise ConfigError(f"data.tokenizer={path!r} has tokens of one byte, or repeated ones")
        self.pieces = [bytes([b]) for b in range(BYTES)] + chunks
        self.bytes_V = np.array([len(piece) for piece in self.pieces], np.int32)
        self.longest = int(self.bytes_V.max())
        self._id_of = {piece: i for i, piece in enumerate(self.pieces)}

    @property
    def size(self) -> int:
        return len(self.pieces)

    def encode(self, data: bytes) -> np.ndarray:
        ids, at = [], 0
        while at < len(data):
            for length in range(min(self.longest, len(data) - at), 0, -1):
                if (found := self._id_of.get(data[at : at + length])) is not None:
                    break
            ids.append(found)
            at += length
        return np.array(ids, np.int32)

    def encode_beginning(self, data: bytes) -> set[tuple[int, ...]]:
        return {tuple(self.encode(data).tolist())}


@lru_cache(maxsize=4)
def read_vocabulary(path: str) -> Vocabulary | LongestMatch:
    """The tokens of a file. Raises ConfigError if it cannot be read, or does not exist yet."""
    if wanted(path):
        raise ConfigError(
            f"data.tokenizer={path!r} is learned by pretrain, into the work directory of a run: "
            "give the file of a tokenizer here"
        )
    try:
        content = parse_json(read_bytes(path).decode())
    except (OSError, ValueError):
        content = None  # the library says what is wrong
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return LongestMatch(path, content)
    return Vocabulary(path)


def starts(vocabulary: Vocabulary | LongestMatch, data: bytes) -> list[int]:
    """Offsets at which the tokens of a text start. Raises ConfigError like `encode`."""
    return np.cumsum([0, *vocabulary.bytes_V[vocabulary.encode(data)][:-1]]).tolist()


def _byte_alphabet() -> dict[str, int]:
    """Map from the character that byte-level BPE writes for a byte to the byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(BYTES) if b not in shown]
    return {chr(b): b for b in shown} | {chr(BYTES + i): b for i, b in enumerate(hidden)}


@lru_cache(maxsize=1024)
def _kinds(begun: bytes) -> str:
    """A character of one byte for each kind of character with which these bytes begin."""
    size = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
    code = begun[0] & (0x7F >> size)
    for byte in begun[1:]:
        code = code << 6 | byte & 0x3F
    shift = 6 * (size - len(begun))
    lowest = max(code << shift, {2: 0x80, 3: 0x800, 4: 0x10000}[size])
    found = set()
    for character in map(chr, range(lowest, min(code + 1 << shift, 0x110000))):
        match unicodedata.category(character):
            case "Cs":
                pass
            case "Lu" | "Ll" | "Lt" | "Lm" | "Lo":
                found.add("a")
            case "Nd" | "Nl" | "No":
                found.add("1")
            case _:
                found.add("\t" if character.isspace() else "!")
    return "".join(sorted(found))


class TokenDocuments:
    """Documents as token ids, kept in a temporary file; can be used instead of `Documents`.

    Long documents are encoded in parts, split where a line or a word begins.
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
        """State for a worker process; the file is deleted with the process that wrote it."""
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
    """Last offset inside a text where a line begins, else a word, else a character."""
    for begin in (rb"\n(?=\S)", rb"(?<=\S)(?= \S)"):
        ends = [found.end() for found in re.finditer(begin, text)]
        if ends:
            return ends[-1]
    return len(text) - next(n for n in range(1, 5) if n == 4 or text[-n] & 0xC0 != 0x80)
