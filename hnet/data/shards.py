"""ArrayRecord shards: documents split into records, with a small index file for each shard.

``shard-00000.array_record`` holds each document as records of ``RECORD_BYTES`` bytes and a last,
shorter record, so that reading a row of a long document does not fetch all of it.
``shard-00000.index.npz`` holds the lengths of the documents. A shard without an index (written by
other software) has one document per record; it is read once when it is opened, for the lengths.
"""

import hashlib
import os
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from rich.console import Console
from rich.progress import track

from hnet.errors import ConfigError
from hnet.files import parse_json, read_bytes

RECORD_BYTES = 16_384
MANIFEST = "manifest.json"
_OPTIONS = "group_size:1,zstd:3"  # one record per group, for fast random access
_SCAN_RECORDS = 1024


@dataclass(frozen=True)
class ShardIndex:
    """Lengths and fingerprint of a shard, known without reading its text."""

    lengths_D: np.ndarray
    """number of bytes of each document that is not empty, int64"""
    record_bytes_R: np.ndarray
    """number of bytes of each record, int64"""
    fingerprint: str


def index_path(shard: Path) -> Path:
    """The index file of a shard."""
    return shard.with_suffix(".index.npz")


def read_index(shard: Path) -> ShardIndex:
    """Read the index of a shard, or scan the shard if it has none.

    Raises ConfigError when the shard is damaged, does not fit its index, or lies in a folder whose
    preparation was not finished.
    """
    manifest = read_manifest(shard.parent)
    if manifest is not None and not manifest["complete"]:
        raise ConfigError(
            f"shards in {str(shard.parent)!r} are unfinished: run the prepare command again"
        )
    try:
        reader = ArrayRecordReader(str(shard))
        num_records = reader.num_records()
        if not index_path(shard).exists():
            return _scan(shard, reader, num_records)
        reader.close()
        with open(index_path(shard), "rb") as f, np.load(f, allow_pickle=False) as index:
            lengths_D = index["lengths_D"]
            record_bytes_R = _record_bytes(lengths_D, int(index["record_bytes"]))
            fingerprint = str(index["fingerprint"])
    except (RuntimeError, OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        reason = (str(e).splitlines() or ["empty"])[0]
        raise ConfigError(
            f"shard {str(shard)!r} or its index is damaged ({reason}): prepare it again"
        ) from e
    if len(record_bytes_R) != num_records:
        raise ConfigError(
            f"shard {str(shard)!r} has {num_records} records but its index says "
            f"{len(record_bytes_R)}: prepare it again"
        )
    return ShardIndex(lengths_D, record_bytes_R, fingerprint)


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a prepared folder; None if there is none in our format."""
    try:
        manifest = parse_json(read_bytes(folder / MANIFEST))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{str(folder / MANIFEST)!r} cannot be read ({e}): remove it") from e
    ours = isinstance(manifest, dict) and str(manifest.get("format", "")).startswith("hnet-shards")
    return manifest if ours else None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: if the process dies, the file is absent, old or complete."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


class ShardWriter:
    """Writes one shard; it has its final name only when it and its index are complete."""

    def __init__(self, path: Path):
        self.path = path
        self.num_bytes = 0
        self._lengths = array("q")
        self._length, self._rest = 0, b""  # length so far and unwritten end of the open document
        self._digest = hashlib.blake2b(digest_size=16)
        self._partial = path.with_name(path.name + ".partial")
        self._writer = ArrayRecordWriter(str(self._partial), _OPTIONS)

    def add(self, text: bytes, ends: bool) -> None:
        """Append a piece of a document; ends: whether it is the last. Skips empty documents."""
        self._digest.update(text)
        self._length += len(text)
        self._rest += text
        whole = len(self._rest) if ends else len(self._rest) // RECORD_BYTES * RECORD_BYTES
        for start in range(0, whole, RECORD_BYTES):
            self._writer.write(self._rest[start : min(start + RECORD_BYTES, whole)])
        self._rest = self._rest[whole:]
        if ends and self._length:
            self._lengths.append(self._length)
            self.num_bytes += self._length
            self._length = 0

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def finish(self, resume_at: tuple[int, int]) -> None:
        """Close the shard; ``resume_at`` is (input file, document in it) of the next document."""
        self._writer.close()
        with open(self._partial, "rb") as f:
            os.fsync(f.fileno())
        lengths_D = np.array(self._lengths, np.int64)
        self._digest.update(lengths_D.tobytes())
        with open(index_path(self.path), "wb") as f:
            np.savez(
                f,
                lengths_D=lengths_D,
                record_bytes=RECORD_BYTES,
                fingerprint=self._digest.hexdigest(),
                resume_at=np.array(resume_at, np.int64),
            )
            f.flush()
            os.fsync(f.fileno())
        os.replace(self._partial, self.path)


def read_resume_point(shard: Path) -> tuple[tuple[int, int], int, int]:
    """((input file, document) after a finished shard, its number of documents, of bytes)."""
    with np.load(index_path(shard), allow_pickle=False) as index:
        file, document = (int(i) for i in index["resume_at"])
        return (file, document), len(index["lengths_D"]), int(index["lengths_D"].sum())


def _record_bytes(lengths_D: np.ndarray, record_bytes: int) -> np.ndarray:
    """Number of bytes of each record; a document is split into full records and a last one.

    (4, 10), 4 -> (4, 4, 4, 2)
    """
    counts_D = -(-lengths_D // record_bytes)
    sizes_R = np.full(int(counts_D.sum()), record_bytes, np.int64)
    sizes_R[np.cumsum(counts_D) - 1] = lengths_D - (counts_D - 1) * record_bytes
    return sizes_R


def _scan(shard: Path, reader: ArrayRecordReader, num_records: int) -> ShardIndex:
    digest = hashlib.blake2b(digest_size=16)
    sizes = []
    groups = range(0, num_records, _SCAN_RECORDS)
    for start in track(
        groups,
        "reading shard lengths",
        console=Console(stderr=True),
        transient=True,
        disable=len(groups) < 64,
    ):
        for record in reader.read(start, min(start + _SCAN_RECORDS, num_records)):
            digest.update(record)
            sizes.append(len(record))
    reader.close()
    record_bytes_R = np.array(sizes, np.int64)
    digest.update(record_bytes_R.tobytes())
    return ShardIndex(record_bytes_R[record_bytes_R > 0], record_bytes_R, digest.hexdigest())
