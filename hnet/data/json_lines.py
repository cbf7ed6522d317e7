"""The "text" of a line of JSON as bytes, for lines of any length.

Bytes that are not UTF-8 pass through the parser unchanged (surrogateescape). A lone surrogate
written as an escape, such as ``\\ud800``, becomes the three bytes that encode it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

LONG = 1 << 16
"""number of bytes from which a line, or a string in it, is read in pieces"""
_MOST = 1 << 26  # maximum bytes of a line without its long strings
_LONGEST_ESCAPE = 12  # a pair of surrogates
_HEX = rb"[0-9a-fA-F]"
_HIGH, _LOW = (rb"\\u[dD][%b]%b%b" % (first, _HEX, _HEX) for first in (b"89abAB", b"c-fC-F"))
_ANY = rb'\\(?:["\\/bfnrt]|u%b{4})' % _HEX
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"%b%b|(%b|%b)|\\." % (_HIGH, _LOW, _HIGH, _LOW))
_STRING = re.compile(rb'(?:[^"\\\x00-\x1f]++|%b)*+' % _ANY)
# The same, but stops at an escaped high surrogate whose next escape is not read yet.
_STRING_SO_FAR = re.compile(rb'(?s:[^"\\\x00-\x1f]++|(?!%b.{0,5}\Z)%b)*+' % (_HIGH, _ANY))


class NoText(ValueError):
    """A line of JSON that is not an object with a string "text"."""

    def __init__(self):
        super().__init__('has no string "text": each line must be an object with that key')


def parse(data: bytes) -> Any:
    """`json.loads` that keeps every byte; `encode` returns the bytes of its strings.

    Raises ValueError for invalid JSON and for JSON that is nested too deeply.
    """
    if _SURROGATE.search(data):
        data = _ESCAPE.sub(_spell_out, data)
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def encode(text: str) -> bytes:
    """The bytes of a string that `parse` returned."""
    return text.encode("utf-8", "surrogateescape")


def text_of_line(line: bytes) -> bytes:
    """The "text" of a line. Raises ValueError if it is not JSON, NoText if it has no "text"."""
    return _text(parse(line))


def text_of_long_line(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the "text" of a line in pieces. Raises the same errors as `text_of_line`.

    Long strings are never in memory as a whole: the line is parsed with empty strings instead.
    """
    line, short, found = _Line(chunks), bytearray(), 0
    while True:
        before, at_string = line.outside()
        short += before
        if len(short) > _MOST:
            raise ValueError(f"it has more than {_MOST} bytes besides its long strings")
        if not at_string:
            if before:
                continue
            break
        pieces = line.string()
        head, whole = next(pieces)
        if whole:
            short += b'"%b"' % head
            continue
        is_text = _awaits_text(short)
        found += is_text
        short += b'""'
        if is_text:
            yield encode(parse(b'"%b"' % head))
        for piece, _ in pieces:
            if is_text:
                yield encode(parse(b'"%b"' % piece))
    text = _text(parse(bytes(short)))
    if found > 1 or found and text:
        raise ValueError('it has several "text"')
    if not found:
        yield text


class _Line:
    """Reads a line from chunks; call `outside` and `string` alternately."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._buffer, self._at = b"", 0

    def _read_more(self) -> bool:
        chunk = next(self._chunks, b"")
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return bool(chunk)

    def outside(self) -> tuple[bytes, bool]:
        """(bytes before the next string, as far as they are read; whether the string follows)."""
        if self._at == len(self._buffer) and not self._read_more():
            return b"", False
        start, quote = self._at, self._buffer.find(b'"', self._at)
        self._at = len(self._buffer) if quote < 0 else quote + 1
        return self._buffer[start : self._at - (quote >= 0)], quote >= 0

    def string(self) -> Iterator[tuple[bytes, bool]]:
        """Yield (a piece that splits no escape, whether the string ends with this piece)."""
        grammar, end, closed = _STRING_SO_FAR, 0, False
        while not closed:
            end = grammar.match(self._buffer, self._at).end()
            closed = self._buffer[end : end + 1] == b'"'
            if closed or end - self._at >= LONG:
                piece, self._at = self._buffer[self._at : end], end + closed
                yield piece, closed
            elif grammar is _STRING or len(self._buffer) - end > _LONGEST_ESCAPE:
                raise ValueError("a string has no end, or holds what JSON does not allow")
            elif not self._read_more():
                grammar = _STRING


def _text(entry: Any) -> bytes:
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise NoText
    return encode(text)


def _spell_out(escape: re.Match[bytes]) -> bytes:
    """An escape, or the bytes that encode it if it is a lone surrogate."""
    lone = escape[1]
    return chr(int(lone[2:], 16)).encode("utf-8", "surrogatepass") if lone else escape[0]


def _awaits_text(before: bytearray) -> bool:
    """Whether the next value is the value of "text" in the outermost object of the line."""
    try:
        pairs = json.loads((before + b"0}").decode("utf-8", "replace"), object_pairs_hook=list)
    except (ValueError, RecursionError):  # a key, or a value inside another value
        return False
    return bool(pairs) and pairs[-1][0] == "text"
