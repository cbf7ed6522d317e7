"""Sources: the concatenated bytes of some documents, with random access, and where each begins.

Text, JSON lines and Parquet are read into memory once. ArrayRecord shards are not: a read fetches
the records it touches, so their size is bounded by the disk, not by memory (but 8 bytes a record
and about 40 a document are kept).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress

from hnet.data import files, pythondocs, synthetic
from hnet.data.shards import read_index
from hnet.errors import ConfigError

if TYPE_CHECKING:
    import grain

_SHOW_PROGRESS_FROM = 64 << 20


class ByteStore(Protocol):
    """Concatenated bytes of all documents of a source."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""


@dataclass(frozen=True)
class MemoryStore:
    """Bytes held in memory."""

    data: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.data[start:stop]


@dataclass(frozen=True)
class ShardStore:
    """Bytes held in the records of ArrayRecord files, which are opened again after pickling."""

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


@dataclass(frozen=True)
class Source:
    """Documents of one glob, in the order of their files; empty documents are left out."""

    name: str
    """the glob"""
    store: ByteStore
    lengths_D: np.ndarray
    """int64, bytes of each document; they lie one behind the other in the store"""
    files: tuple[str, ...]
    file_starts: np.ndarray
    """int64, number of the first document of each file"""
    fingerprint: str
    """hash of the documents and their order"""

    @property
    def num_bytes(self) -> int:
        return int(self.lengths_D.sum())

    def document_name(self, d: int) -> str:
        """The file, followed by ``:n`` (from 1) where a file holds several documents."""
        f = int(np.searchsorted(self.file_starts, d, side="right")) - 1
        end = self.file_starts[f + 1] if f + 1 < len(self.files) else len(self.lengths_D)
        one = end - self.file_starts[f] == 1
        return self.files[f] if one else f"{self.files[f]}:{d - self.file_starts[f] + 1}"

    def keys_D(self) -> np.ndarray:
        """uint64 hash of each document's file name (without its folder) and number in the file."""
        file_keys = np.array([_name_key(os.path.basename(f)) for f in self.files], np.uint64)
        counts = np.diff(np.append(self.file_starts, len(self.lengths_D)))
        number_D = np.arange(len(self.lengths_D)) - np.repeat(self.file_starts, counts)
        return _mix(np.repeat(file_keys, counts) + number_D.astype(np.uint64))


def open_source(
    pattern: str, *, field: str = "data.files", leave_out: Iterable[str] = ()
) -> Source:
    """Open what one entry of ``data.files`` names, without the files whose real path is given.

    Raises ConfigError, in one line, when nothing matches or something cannot be read.
    """
    if pattern == pythondocs.NAME:
        return _in_memory(pattern, pythondocs.documents())
    if pattern.startswith(synthetic.PREFIX):
        return _in_memory(pattern, synthetic.documents(pattern))
    left_out = set(leave_out)
    paths = [p for p in files.expand(pattern, field) if os.path.realpath(p) not in left_out]
    if not paths:
        raise ConfigError(f"{field}: all files of {pattern!r} are in data.eval_files too")
    shards = [files.is_shard(p) for p in paths]
    if all(shards):
        return _from_shards(pattern, paths)
    if any(shards):
        raise ConfigError(f"{field}: {pattern!r} mixes shards with text: give a glob for each")
    return _in_memory(pattern, _documents_of(paths))


def is_built_in(pattern: str) -> bool:
    """Whether an entry of ``data.files`` names text that comes with the package or Python."""
    return pattern == pythondocs.NAME or pattern.startswith(synthetic.PREFIX)


def _documents_of(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    sizes = [os.path.getsize(p) for p in paths]
    hidden = sum(sizes) < _SHOW_PROGRESS_FROM
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("reading text", total=sum(sizes))
        before = 0
        for path, size in zip(paths, sizes):
            for document, consumed in files.read_documents(path):
                yield path, document
                progress.update(task, completed=before + consumed)
            before += size


def _in_memory(name: str, documents: Iterable[tuple[str, bytes]]) -> Source:
    """Concatenate (file, document) pairs; pairs of one file must follow each other."""
    data, lengths, names, starts = bytearray(), [], [], []
    for file, document in documents:
        if not document:
            continue
        if not names or names[-1] != file:
            names.append(file)
            starts.append(len(lengths))
        data += document
        lengths.append(len(document))
    lengths_D = np.array(lengths, np.int64)
    digest = hashlib.blake2b(lengths_D.tobytes(), digest_size=16)
    digest.update(data)
    return Source(
        name=name,
        store=MemoryStore(np.frombuffer(data, np.uint8)),
        lengths_D=lengths_D,
        files=tuple(names),
        file_starts=np.array(starts, np.int64),
        fingerprint=digest.hexdigest(),
    )


def _from_shards(name: str, paths: list[str]) -> Source:
    import grain  # here: a command reads its arguments before it is loaded

    indices = [read_index(Path(p)) for p in paths]
    document_counts = [len(index.lengths_D) for index in indices]
    record_bytes = np.concatenate([index.record_bytes_R for index in indices])
    digest = hashlib.blake2b("".join(i.fingerprint for i in indices).encode(), digest_size=16)
    return Source(
        name=name,
        store=ShardStore(
            grain.sources.ArrayRecordDataSource(paths),
            np.concatenate([[0], np.cumsum(record_bytes, dtype=np.int64)]),
        ),
        lengths_D=np.concatenate([index.lengths_D for index in indices]),
        files=tuple(paths),
        file_starts=np.concatenate([[0], np.cumsum(document_counts)[:-1]]).astype(np.int64),
        fingerprint=digest.hexdigest(),
    )


def _name_key(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread uint64 numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
