"""Sources: the documents of one entry of ``data.files``, with random access.

Text and short JSON lines are read directly from their files. Text from gzip or Parquet files, long
JSON lines and built-in text is unpacked once to a temporary file. The index in memory takes about
50 bytes per document and, for ArrayRecord shards, 8 bytes per record.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from hnet.data import files, pythondocs, synthetic
from hnet.data.files import Chunk
from hnet.data.forms import is_shard
from hnet.data.shards import read_index
from hnet.data.stores import OURS, ByteStore, ShardStore, Spool, Stamp, TextStore, stamp
from hnet.errors import ConfigError

_SHOW_PROGRESS_FROM, _SHOW_EVERY = 64 << 20, 1 << 20
_DIGEST = 16


@dataclass(frozen=True)
class Source:
    """Documents of one glob, in the order of their files, without empty documents."""

    name: str
    """the glob"""
    store: ByteStore
    lengths_D: np.ndarray
    """number of bytes per document, int64; documents are contiguous in the store"""
    files: tuple[str, ...]
    file_starts: np.ndarray
    """number of the first document of each file, int64"""
    digests: bytes
    """hash of the documents of each file, concatenated in order"""

    @property
    def num_bytes(self) -> int:
        return int(self.lengths_D.sum())

    def file_of(self, d: int) -> str:
        """The file of document d, or the name of a built-in document."""
        return self.files[int(np.searchsorted(self.file_starts, d, side="right")) - 1]

    def document_name(self, d: int) -> str:
        """The file, followed by ``:n`` (from 1) if the file holds several documents."""
        f = int(np.searchsorted(self.file_starts, d, side="right")) - 1
        end = self.file_starts[f + 1] if f + 1 < len(self.files) else len(self.lengths_D)
        one = end - self.file_starts[f] == 1
        return self.files[f] if one else f"{self.files[f]}:{d - self.file_starts[f] + 1}"

    def keys_D(self) -> np.ndarray:
        """uint64 hash per document of its file name (without folder) and its number in the file."""
        file_keys = np.array([_name_key(os.path.basename(f)) for f in self.files], np.uint64)
        counts = np.diff(np.append(self.file_starts, len(self.lengths_D)))
        number_D = np.arange(len(self.lengths_D)) - np.repeat(self.file_starts, counts)
        return _mix(np.repeat(file_keys, counts) + number_D.astype(np.uint64))


def open_source(
    pattern: str, *, field: str = "data.files", leave_out: Iterable[str] = ()
) -> Source:
    """Open the source that one entry of ``data.files`` names.

    leave_out: paths of files to skip, whatever links to them are called. Raises ConfigError, in one
    line, when nothing matches or a file cannot be read.
    """
    if pattern == pythondocs.NAME:
        return _built_in(pattern, pythondocs.documents())
    if pattern.startswith(synthetic.PREFIX):
        return _built_in(pattern, synthetic.documents(pattern))
    left_out = set(map(_identity, leave_out))
    paths = [p for p in files.expand(pattern, field) if _identity(p) not in left_out]
    if not paths:
        raise ConfigError(f"{field}: all files of {pattern!r} are in data.eval_files too")
    shards = [is_shard(p) for p in paths]
    if all(shards):
        return _from_shards(pattern, paths)
    if any(shards):
        raise ConfigError(f"{field}: {pattern!r} mixes shards with text: give a glob for each")
    return _from_files(pattern, paths)


def _identity(path: str) -> tuple[int, int] | str:
    """What is the same for all links to a file; the path if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def is_built_in(pattern: str) -> bool:
    """Whether an entry of ``data.files`` names text that is part of this package or of Python."""
    return pattern == pythondocs.NAME or pattern.startswith(synthetic.PREFIX)


def _from_files(name: str, paths: list[str]) -> Source:
    sizes = [os.path.getsize(p) for p in paths]
    hidden = sum(sizes) < _SHOW_PROGRESS_FROM
    texts, before = _Texts(), 0
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("reading text", total=sum(sizes))
        for path, size in zip(paths, sizes):
            opened, shown = _stamp(path), 0
            texts.begin_file(path, opened)
            for chunk in files.read_chunks(path):
                texts.add(chunk)
                if chunk.consumed >= shown + _SHOW_EVERY:
                    shown = chunk.consumed
                    progress.update(task, completed=before + shown)
            if _stamp(path) != opened:
                raise ConfigError(f"data file {path!r} is being written to: wait until it is whole")
            before += size
    return texts.source(name)


def _stamp(path: str) -> Stamp:
    try:
        return stamp(path)
    except OSError as e:
        raise ConfigError(f"data file {path!r} cannot be read ({e.strerror})") from e


def _built_in(name: str, documents: Iterable[tuple[str, bytes]]) -> Source:
    texts = _Texts()
    for document_name, document in documents:
        texts.begin_file(document_name)
        texts.add(Chunk(document, True, 0))
    return texts.source(name)


class _Texts:
    """Index of the documents, built in one pass, to find them again."""

    def __init__(self):
        self._digest, self._digests = hashlib.blake2b(digest_size=_DIGEST), bytearray()
        self._spool = Spool()
        self._files: list[str] = []
        self._first = array("q")  # first document of each file
        self._stamps = array("Q")
        self._file, self._start, self._line, self._length = map(array, "iqiq")
        self._so_far = 0  # bytes so far of the unfinished document

    def begin_file(self, name: str, opened: Stamp = OURS) -> None:
        """Start a file; its chunks follow. opened: its stamp, if it can be read again later."""
        if self._files and self._first[-1] == len(self._length):  # the previous file has no text
            self._files.pop(), self._first.pop()
            del self._stamps[-3:]
        elif self._files:
            self._digest.update(self._length[self._first[-1] :].tobytes())
            self._digests += self._digest.digest()
            self._digest = hashlib.blake2b(digest_size=_DIGEST)
        self._files.append(name)
        self._first.append(len(self._length))
        self._stamps.extend(opened)

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk of the file."""
        if not self._so_far:
            self._place = (len(self._files) - 1, chunk.start)
            if chunk.start < 0:
                self._place = (-1, self._spool.size)
        if chunk.start < 0:
            self._spool.write(chunk.text)
        self._digest.update(chunk.text)
        self._so_far += len(chunk.text)
        if chunk.ends and self._so_far:
            self._file.append(self._place[0])
            self._start.append(self._place[1])
            self._line.append(chunk.line)
            self._length.append(self._so_far)
            self._so_far = 0

    def source(self, name: str) -> Source:
        self.begin_file("")  # an entry for the spool; also removes a last file without text
        self._spool.flush()
        lengths_D = np.array(self._length, np.int64)
        stamps = np.array(self._stamps, np.uint64).reshape(-1, 3)
        store = TextStore(
            paths=(*self._files[:-1], self._spool.path),
            stamps_F3=stamps,
            file_D=np.array(self._file, np.int32),
            start_D=np.array(self._start, np.int64),
            line_bytes_D=np.array(self._line, np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths_D, dtype=np.int64)]),
            spool=self._spool,
        )
        return Source(
            name=name,
            store=store,
            lengths_D=lengths_D,
            files=tuple(self._files[:-1]),
            file_starts=np.array(self._first[:-1], np.int64),
            digests=bytes(self._digests),
        )


def _from_shards(name: str, paths: list[str]) -> Source:
    import grain  # imported here so that a command reads its arguments first

    indices = [read_index(Path(p)) for p in paths]
    document_counts = [len(index.lengths_D) for index in indices]
    record_bytes = np.concatenate([index.record_bytes_R for index in indices])
    return Source(
        name=name,
        store=ShardStore(
            grain.sources.ArrayRecordDataSource(paths),
            np.concatenate([[0], np.cumsum(record_bytes, dtype=np.int64)]),
        ),
        lengths_D=np.concatenate([index.lengths_D for index in indices]),
        files=tuple(paths),
        file_starts=np.concatenate([[0], np.cumsum(document_counts)[:-1]]).astype(np.int64),
        digests="".join(index.fingerprint for index in indices).encode(),
    )


def _name_key(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
