"""Stores: the concatenated bytes of documents, read directly from disk.

Memory holds only the offsets of the documents. So the size of a corpus is limited by the disk, and
the processes that build batches share the page cache of the system.
"""

import os
import pickle
import sys
import tempfile
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hnet.data.json_lines import text_of_line
from hnet.errors import ConfigError

if TYPE_CHECKING:
    import grain

_OPEN_FILES = 16  # maximum number of open files per store
_BUFFER = 1 << 20
_ALIGNMENT = 64


class ByteStore(Protocol):
    """Concatenated bytes of all documents of a source."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of one document as uint8."""


Stamp = tuple[int, int, int]
OURS = (0, 0, 0)
"""stamp of a file that only this process writes; such a file is not checked for changes"""


def stamp(file: str | int) -> Stamp:
    """(inode, bytes, time of the last change) of a path or an open file. Raises OSError."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


class File:
    """Random access to a file that must not change; a worker opens it again after unpickling."""

    def __init__(self, path: str, expected: Stamp):
        self._path, self._expected = path, expected
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise self._changed(e.strerror) from e
        weakref.finalize(self, os.close, self._fd)

    def __reduce__(self) -> tuple:
        return File, (self._path, self._expected)

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes at `start`. Raises ConfigError if the file has changed."""
        parts, left = [], size
        try:
            while left and (part := os.pread(self._fd, left, start + size - left)):
                parts.append(part)
                left -= len(part)
            now = stamp(self._fd)
        except OSError as e:
            raise self._changed(e.strerror) from e
        if left or self._expected not in (OURS, now):
            raise self._changed("it was written to")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _changed(self, why: str) -> ConfigError:
        return ConfigError(
            f"data file {self._path!r} changed since it was opened ({why}): start again; text must "
            "stay as it is during a run"
        )


class Spool:
    """A temporary file for text that cannot be read from its own file; deleted with the process.

    It is created in TMPDIR, else in /var/tmp, which unlike /tmp is usually not held in memory.
    """

    def __init__(self):
        folder = None if os.environ.get("TMPDIR") or not os.path.isdir("/var/tmp") else "/var/tmp"
        linux = sys.platform == "linux"
        make = tempfile.TemporaryFile if linux else tempfile.NamedTemporaryFile
        try:
            self._file = make(prefix="hnet-", dir=folder, buffering=_BUFFER)
        except OSError as e:
            raise _no_room(e) from e
        weakref.finalize(self, self._file.close)
        fd = self._file.fileno()
        self.path = f"/proc/{os.getpid()}/fd/{fd}" if linux else self._file.name
        """path at which this process and its workers can open the file"""
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        try:
            self.size += self._file.write(data)
        except OSError as e:
            raise _no_room(e) from e

    def flush(self) -> None:
        """Make the written bytes visible to other processes."""
        try:
            self._file.flush()
        except OSError as e:
            raise _no_room(e) from e

    def reader(self) -> File:
        """Flush, and open the file for reading; call it after the last `write`."""
        self.flush()
        return File(self.path, OURS)


class Shared:
    """A value whose arrays are memory-mapped, not copied, by other processes."""

    def __init__(self, value: Any):
        self._spool, places = Spool(), []

        def write(buffer: pickle.PickleBuffer) -> None:
            self._spool.write(bytes(-self._spool.size % _ALIGNMENT))
            places.append((self._spool.size, buffer.raw().nbytes))
            self._spool.write(buffer.raw())

        pickled = pickle.dumps(value, protocol=5, buffer_callback=write)
        self._spool.flush()
        self.key = (pickled, self._spool.path, places)
        """argument for `open`; valid as long as this object exists"""

    @staticmethod
    def open(key: tuple[bytes, str, list[tuple[int, int]]]) -> Any:
        """The value, in another process."""
        pickled, path, places = key
        whole = np.memmap(path, np.uint8, "r") if any(size for _, size in places) else b""
        return pickle.loads(pickled, buffers=[whole[a : a + size] for a, size in places])


def _no_room(error: OSError) -> ConfigError:
    return ConfigError(
        f"text that is packed, or made, is unpacked to a temporary file, which cannot be written "
        f"({error.strerror}): set TMPDIR to a folder with room, or make shards of the text with "
        "python -m hnet.data prepare"
    )


@dataclass(frozen=True)
class TextStore:
    """D documents in F files, the last of which may be a spool."""

    paths: tuple[str, ...]
    stamps_F3: np.ndarray
    """`stamp` of each file, uint64"""
    file_D: np.ndarray
    """index of the file of each document, int32; -1 = the last file, the spool"""
    start_D: np.ndarray
    """offset in the file of the document, or of the JSON line that holds it, int64"""
    line_bytes_D: np.ndarray
    """number of bytes of the JSON line, int32; 0 = the document is stored as plain bytes"""
    offsets: np.ndarray
    """number of bytes in all documents before each one, then the total, int64 (D + 1,)"""
    spool: Spool | None = None

    def __post_init__(self):
        object.__setattr__(self, "_open", lru_cache(maxsize=_OPEN_FILES)(self._open_file))

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker process; the spool stays open in the process that wrote it."""
        return self.__dict__ | {"spool": None, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def _open_file(self, f: int) -> File:
        return File(self.paths[f], tuple(map(int, self.stamps_F3[f])))

    def read(self, start: int, stop: int) -> np.ndarray:
        d = int(np.searchsorted(self.offsets, start, side="right")) - 1
        file, begin = self._open(int(self.file_D[d])), int(self.start_D[d])
        start, stop = start - int(self.offsets[d]), stop - int(self.offsets[d])
        if size := int(self.line_bytes_D[d]):
            return np.frombuffer(text_of_line(file.read(begin, size)), np.uint8)[start:stop]
        return np.frombuffer(file.read(begin + start, stop - start), np.uint8)


@dataclass(frozen=True)
class ShardStore:
    """Bytes in the records of ArrayRecord files, which are opened again after unpickling."""

    records: "grain.sources.ArrayRecordDataSource"
    offsets_R: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.offsets_R, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets_R, stop, side="left"))
        try:
            found = b"".join(self.records[i] for i in range(first, last))
        except RuntimeError as e:
            raise ConfigError(
                f"a shard of {os.path.dirname(self.records.paths[0])!r} is damaged "
                f"({str(e).splitlines()[0]}): prepare it again"
            ) from e
        origin = int(self.offsets_R[first])
        return np.frombuffer(found, np.uint8)[start - origin : stop - origin]
