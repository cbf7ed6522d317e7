"""The form of a file, detected from its content and, where that is ambiguous, from its suffix."""

import gzip
import re
from typing import Literal, NamedTuple

from hnet.data.json_lines import text_of_line
from hnet.errors import ConfigError

SHARD_SUFFIXES = (".array_record", ".arrayrecord")
RAW_SUFFIX = ".bin"
"""suffix of files that are read as raw bytes whatever their content"""
BOM = b"\xef\xbb\xbf"
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_PACKED_SUFFIXES = (".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz")
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_OTHERS = (  # formats recognised by their first bytes, even in short files
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive"),
    (rb"BZh[1-9]1AY&SY", "packed with bzip2"),
    (rb"\xfd7zXZ\x00", "packed with xz"),
    (rb"\x28\xb5\x2f\xfd", "packed with zstd"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"(?s:.{257})ustar", "a tar archive"),
    (rb"%PDF-", "a PDF file"),
    (rb"\x5d\x00\x00.\x00", "packed with lzma"),
    (rb"\x04\x22\x4d\x18", "packed with lz4"),
    (rb"\x1f\x9d[\x89-\x90]", "packed with compress"),
    (rb"\x89PNG\r\n|GIF8[79]a|\xff\xd8\xff[\xdb\xe0\xe1]", "an image"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x80[\x04\x05]\x95", "a pickle"),
    (rb"SQLite format 3\x00", "a database"),
    (rb"\x7fELF", "a program"),
    (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "UTF-16 or UTF-32"),
    (_GZIP, "packed with gzip a second time"),
    (rb"Obj\x01", "an Avro table"),
    (rb"WARC/\d", "a WARC archive of web pages"),
    (rb"!<arch>\n", "an ar archive"),
    (rb"\{\\rtf\d", "an RTF document"),
    (rb"version https://git-lfs", "a pointer of Git LFS (git lfs pull gets the file)"),
)
_HEAD = 1 << 16
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not ESC, which colours logs
_BINARY_FROM, _BINARY_SHARE = 256, 0.05
_FRAMED = re.compile(rb"\x00\x00|\A(?:[^\x00]\x00){2}")  # numbers or padding; UTF-16
_FRAMED_WITHIN = 8000  # bytes
_OPENS_LINES = re.compile(rb'\s*\{[^\n]*"text"\s*:\s*"')
_OTHER_JSON = re.compile(rb'\s*[\[{].*"text"\s*:\s*"', re.DOTALL)


class Form(NamedTuple):
    """How to read a file."""

    kind: Literal["text", "lines", "parquet"]
    """content of the file: one document as stored, JSON lines, or a table"""
    gzipped: bool


def lines_of(data: bytes) -> list[bytes]:
    """Lines without their line ends (LF or CRLF) and without a byte order mark."""
    data = data.removeprefix(BOM).removesuffix(b"\n")
    return [line.removesuffix(b"\r") for line in data.split(b"\n")] if data else []


def is_shard(path: str) -> bool:
    """Whether the name is that of an ArrayRecord file."""
    return path.lower().endswith(SHARD_SUFFIXES)


def form_of(path: str) -> Form:
    """The form of a file. Raises ConfigError if it is not text of a known form.

    A gzip stream is unpacked whatever its name is. Text is read as JSON lines if the name ends in
    .jsonl or .ndjson, or if the first line is an object with a string "text" and the name does not
    end in .txt or .bin.
    """
    name = path.lower()
    with open(path, "rb") as f:
        head = f.read(_HEAD)
    gzipped = head.startswith(_GZIP) or name.endswith(".gz")
    if gzipped:
        name = name.removesuffix(".gz")
        with gzip.open(path) as f:
            head = f.read(_HEAD)
    if head.startswith(_PARQUET) or name.endswith(".parquet"):
        if gzipped:
            raise ConfigError(f"data file {path!r} is Parquet packed with gzip: unpack it")
        return Form("parquet", False)
    if not name.endswith(RAW_SUFFIX):
        _check_text(path, name, head)
    lines = name.endswith(_LINES_SUFFIXES)
    if not name.endswith((*_LINES_SUFFIXES, ".txt", RAW_SUFFIX)):
        lines = _has_json_lines(head)
        if not lines and name.endswith(".json") and _OTHER_JSON.match(head):
            raise ConfigError(
                f'data file {path!r} is JSON without an object with a string "text" per line: '
                "write it so (.jsonl)"
            )
    return Form("lines" if lines else "text", gzipped)


def _check_text(path: str, name: str, head: bytes) -> None:
    found = next((what for magic, what in _OTHERS if re.match(magic, head)), "")
    if not found and name.endswith(_PACKED_SUFFIXES):
        found = f"packed in a way not read here (*{name[name.rindex('.') :]})"
    if not found and len(head) >= _BINARY_FROM:
        share = len(_CONTROL.findall(head)) / len(head)
        if share >= _BINARY_SHARE:
            found = f"not text ({share:.0%} of its first bytes are control characters)"
    if not found and _FRAMED.search(head[:_FRAMED_WITHIN]):
        found = "not text (bytes of value 0 are near its beginning)"
    if found:
        raise ConfigError(
            f"data file {path!r} is {found}: give text, JSON lines, .gz of both, or Parquet; "
            f"a name that ends in {RAW_SUFFIX} stands for any bytes"
        )


def _has_json_lines(head: bytes) -> bool:
    """Whether the first line of text is a JSON object with a string "text"."""
    head = head.removeprefix(BOM).lstrip()
    line, end, _ = head.partition(b"\n")
    if not end and len(head) >= _HEAD // 2:  # the line is longer than what was read
        return bool(_OPENS_LINES.match(line))
    try:
        text_of_line(line)
    except ValueError:
        return False
    return True
