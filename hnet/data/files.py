"""From globs to documents: plain text, JSON lines, Parquet, and gzip of the first two.

A document is the bytes exactly as stored, invalid UTF-8 included, without normalisation.
"""

import contextlib
import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from hnet.data import json_lines
from hnet.data.forms import BOM, form_of
from hnet.errors import ConfigError, first_line

_CHUNK = 1 << 20
_PARQUET_BYTES = 1 << 24  # approximate bytes of rows read together


class Chunk(NamedTuple):
    """A piece of a document; pieces come in the order of the file."""

    text: bytes
    ends: bool
    """whether the document ends with this chunk"""
    consumed: int
    """number of bytes of the file read so far"""
    start: int = -1
    """offset in the file of the document, or of the JSON line that holds it; -1 = the document
    cannot be read from the file again"""
    line: int = 0
    """number of bytes of the JSON line; 0 = the document is stored in the file as plain bytes"""


def expand(pattern: str, field: str = "data.files") -> list[str]:
    """Sorted files that match a glob. Raises ConfigError when there are none."""
    try:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    except (ValueError, OSError) as e:  # for example a zero byte in the name
        raise ConfigError(f"{field}: {pattern!r} cannot be a path ({e})") from None
    files = [path for path in matches if os.path.isfile(path)]
    if files:
        return files
    if any(map(os.path.isdir, matches)):
        raise ConfigError(
            f"{field}: {pattern!r} names a folder: name its files, e.g. "
            f"{os.path.join(pattern, '*.txt')!r}"
        )
    if matches:
        raise ConfigError(
            f"{field}: {pattern!r} is no regular file: text is read more than once, so write a "
            "pipe or a device to a file first"
        )
    raise ConfigError(f"{field}: {pattern!r} matches no file: check the path and quote the glob")


def read_chunks(path: str) -> Iterator[Chunk]:
    """Yield the documents of a file that is not a shard, in chunks of about 1 MiB at most.

    Raises ConfigError, which names the file and for JSON lines also the line, if something cannot
    be read.
    """
    with _one_line_errors(path):
        kind, gzipped = form_of(path)
        match kind:
            case "parquet":
                yield from _parquet_chunks(path)
                return
            case "lines":
                read = _line_chunks
            case "text":
                read = _text_chunks
            case _:
                raise AssertionError(kind)
        with open(path, "rb") as raw:
            if not gzipped:
                yield from read(path, raw, raw)
                return
            with gzip.GzipFile(fileobj=raw) as stream:
                for chunk in read(path, stream, raw):
                    yield chunk._replace(start=-1, line=0)


def check_form(path: str) -> None:
    """Raise ConfigError if a file is not text of a known form, judged by its beginning."""
    with _one_line_errors(path):
        form_of(path)


def _text_chunks(path: str, stream, raw) -> Iterator[Chunk]:
    del path
    text = stream.read(_CHUNK)
    while following := stream.read(_CHUNK):
        yield Chunk(text, False, raw.tell(), 0)
        text = following
    yield Chunk(text, True, raw.tell(), 0)


def _line_chunks(path: str, stream, raw) -> Iterator[Chunk]:
    at = len(BOM) if stream.read(len(BOM)) == BOM else 0
    stream.seek(at)
    number = 0
    while line := stream.readline(json_lines.LONG):
        number, consumed = number + 1, raw.tell()
        try:
            if line.endswith(b"\n") or len(line) < json_lines.LONG:
                if line.strip():
                    yield Chunk(json_lines.text_of_line(line), True, consumed, at, len(line))
            else:
                for text in json_lines.text_of_long_line(_chunks_of_line(line, stream)):
                    yield Chunk(text, False, raw.tell())
                yield Chunk(b"", True, raw.tell())
                at = stream.tell() - len(line)
        except json_lines.NoText as e:
            raise ConfigError(f"{path}:{number} {e}") from None
        except ValueError as e:
            raise ConfigError(
                f"{path}:{number} is not JSON ({e}): correct or remove the line"
            ) from None
        at += len(line)


def _chunks_of_line(head: bytes, stream) -> Iterator[bytes]:
    while head:
        yield head
        head = b"" if head.endswith(b"\n") else stream.readline(json_lines.LONG)


def _parquet_chunks(path: str) -> Iterator[Chunk]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"data file {path!r} needs pyarrow: install the extra, pip install 'hnet-jax[parquet]'"
        ) from None
    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as table:
            if "text" not in table.schema_arrow.names:
                raise ConfigError(
                    f'data file {path!r} has no column "text" but {table.schema_arrow.names}'
                )
            done, rows, size = 0, max(1, table.metadata.num_rows), os.path.getsize(path)
            for values in _parquet_values(table):
                for value in values:
                    done += 1
                    yield from _pieces(_parquet_text(path, done, value), size * done // rows)
    except pa.ArrowException as e:
        raise ConfigError(f"data file {path!r} is not readable Parquet ({first_line(e)})") from e


def _parquet_values(table) -> Iterator:
    """Arrays of the column "text", each of at most about _PARQUET_BYTES bytes, or of one value."""
    for g in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(g)
        rows = max(1, min(1024, _PARQUET_BYTES * group.num_rows // max(1, group.total_byte_size)))
        batches = table.iter_batches(
            batch_size=rows, row_groups=[g], columns=["text"], use_threads=False
        )
        for batch in batches:
            yield batch.column(0)


def _parquet_text(path: str, row: int, value) -> memoryview:
    if hasattr(value, "value"):  # an entry of a dictionary-encoded column
        value = value.value
    if not hasattr(value, "as_buffer") or not value.is_valid:
        raise ConfigError(f'{path}: row {row} of column "text" is not a string')
    return memoryview(value.as_buffer())


def _pieces(document: memoryview, consumed: int) -> Iterator[Chunk]:
    for start in range(0, len(document), _CHUNK):
        yield Chunk(bytes(document[start : start + _CHUNK]), False, consumed)
    yield Chunk(b"", True, consumed)


@contextlib.contextmanager
def _one_line_errors(path: str):
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(
            f"data file {path!r} cannot be read ({reason}): repair it or leave it out"
        ) from e
