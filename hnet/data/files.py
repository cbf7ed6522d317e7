"""From globs to documents: plain text, JSON lines, Parquet, and gzip of the first two.

A document is ``bytes`` exactly as stored: invalid UTF-8 stays, nothing is normalised.
"""

import contextlib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator

from hnet.errors import ConfigError

SHARD_SUFFIXES = (".array_record", ".arrayrecord")
_PACKED_SUFFIXES = (".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")


def expand(pattern: str, field: str = "data.files") -> list[str]:
    """Sorted files that a glob matches. Raises ConfigError when there is none."""
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in matches if os.path.isfile(path)]
    if files:
        return files
    if matches:
        raise ConfigError(
            f"{field}: {pattern!r} names a folder: name its files, e.g. "
            f"{os.path.join(pattern, '*.txt')!r}"
        )
    raise ConfigError(f"{field}: {pattern!r} matches no file: check the path and quote the glob")


def is_shard(path: str) -> bool:
    """Whether the name is that of an ArrayRecord file."""
    return path.endswith(SHARD_SUFFIXES)


def read_documents(path: str) -> Iterator[tuple[bytes, int]]:
    """Yield (document, bytes of the file consumed so far) of one file that is not a shard.

    A document, and for plain text that is a file, must fit into memory. Raises ConfigError naming
    the file, and for JSON lines the line, of anything that cannot be read.
    """
    plain = path.removesuffix(".gz")
    if path.endswith(_PACKED_SUFFIXES):
        raise ConfigError(
            f"data file {path!r} is packed in a way not read here: unpack it or use .gz"
        )
    with _one_line_errors(path):
        if plain.endswith(".parquet"):
            yield from _read_parquet(path)
            return
        with open(path, "rb") as raw, _unpacked(path, raw) as stream:
            if plain.endswith(".jsonl"):
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _text_of_line(path, number, line), raw.tell()
            else:
                yield stream.read(), raw.tell()


@contextlib.contextmanager
def _one_line_errors(path: str):
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(
            f"data file {path!r} cannot be read ({reason}): repair it or leave it out"
        ) from e


def _unpacked(path: str, raw):
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else contextlib.nullcontext(raw)


def _text_of_line(path: str, number: int, line: bytes) -> bytes:
    try:
        # surrogateescape carries bytes that are not UTF-8 through the JSON parser unchanged
        entry = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(
            f"{path}:{number} is not JSON ({e}): correct or remove the line"
        ) from None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ConfigError(
            f'{path}:{number} has no string "text": each line must be an object with that key'
        )
    return _encode(text)


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate written as an escape such as \ud800
        return text.encode("utf-8", "surrogatepass")


def _read_parquet(path: str) -> Iterator[tuple[bytes, int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"data file {path!r} needs pyarrow: install the extra, pip install 'hnet-jax[parquet]'"
        ) from None
    try:
        with pq.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise ConfigError(
                    f'data file {path!r} has no column "text" but {table.schema_arrow.names}'
                )
            done, rows = 0, max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0):
                    done += 1
                    text = value.as_py()
                    if not isinstance(text, str | bytes):
                        raise ConfigError(f'{path}: row {done} of column "text" is not a string')
                    document = text if isinstance(text, bytes) else _encode(text)
                    yield document, os.path.getsize(path) * done // rows
    except pa.ArrowException as e:
        raise ConfigError(f"data file {path!r} is not readable Parquet ({_first_line(e)})") from e


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
