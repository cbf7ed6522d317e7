"""Texts as padded batches with few different shapes."""

from collections.abc import Sequence

import numpy as np

from hnet.chunking.slots import bucket
from hnet.errors import ConfigError

MIN_LENGTH = 16


def encode(text: str | bytes) -> bytes:
    """The bytes of a prompt; lone surrogates U+DC80 to U+DCFF become the bytes 0x80 to 0xFF."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as e:
        raise ConfigError(f"prompt {text!r} is no text ({e.reason}): give valid Unicode") from None


def length_bucket(length: int) -> int:
    """Round up to a power of two, at least 16, to limit the number of compilations."""
    return max(MIN_LENGTH, 1 << max(0, length - 1).bit_length())


def row_length(length: int) -> int:
    """Length of the rows for texts of up to `length` bytes: few values, at most an eighth too long
    from 512 bytes on."""
    return length_bucket(length) if length <= 64 else bucket(1 << 31, length, 8, least=64)


def pad(texts: Sequence[bytes], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 (B, L) padded with 0 on the right, lengths int32 (B,))."""
    length = length or row_length(max((len(t) for t in texts), default=0))
    ids_BL = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids_BL[row, : len(text)] = np.frombuffer(text, np.uint8)
    return ids_BL, np.array([len(t) for t in texts], np.int32)
