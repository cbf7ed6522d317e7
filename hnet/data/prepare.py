"""Write raw text to ArrayRecord shards; an interrupted run can be resumed.

The folder holds ``shard-NNNNN.array_record`` files, each with an index file, and ``manifest.json``,
which names the input files and says whether the folder is complete. A shard gets its final name
when it is complete, so an interrupted run resumes after the last complete shard.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hnet.data.files import Chunk, check_form, expand, read_chunks
from hnet.data.forms import is_shard
from hnet.data.shards import (
    MANIFEST,
    RECORD_BYTES,
    ShardWriter,
    read_manifest,
    read_resume_point,
    replace_file,
)
from hnet.errors import ConfigError
from hnet.outputs import local_folder, lock

_FORMAT = "hnet-shards-1"
_LOCK = ".lock"


def prepare(files: tuple[str, ...], out: str, shard_bytes: int = 256 << 20) -> dict:
    """Write the documents of text, JSON lines or Parquet files to shards in a folder.

    Args:
        files: globs, read in this order.
        out: a new or empty folder, or one that the same call has begun.
        shard_bytes: number of bytes of text per shard; the last document of a shard may exceed it.

    Returns the manifest. The same call resumes after an interruption and changes nothing after
    completion. Raises ConfigError when the folder holds something else, an input changed since the
    first call, another process writes there, or an input cannot be read.
    """
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes}: use 1 or more")
    if not files:
        raise ConfigError("files is empty: name the text, e.g. --files 'text/*.txt'")
    inputs = [path for pattern in files for path in expand(pattern, "files")]
    for path in inputs:
        if is_shard(path):
            raise ConfigError(f"files: {path!r} is a shard already: give text to prepare")
        check_form(path)  # before anything is written
    manifest = {
        "format": _FORMAT,
        "complete": False,
        "shard_bytes": shard_bytes,
        "record_bytes": RECORD_BYTES,
        "inputs": [_describe(path) for path in inputs],
    }
    folder = local_folder(out, "out")
    with _errors_of(folder), _claimed(folder, manifest) as begun:
        if begun["complete"]:
            return begun
        return _write(folder, inputs, begun)


def _describe(path: str) -> dict:
    status = os.stat(path)
    return {
        "path": os.path.abspath(path),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ConfigError(
            f"out={str(folder)!r} cannot be written ({reason}): finished shards are kept, the "
            "same command goes on after them"
        ) from e


@contextlib.contextmanager
def _claimed(folder: Path, manifest: dict) -> Iterator[dict]:
    """Lock the folder against other processes and yield its manifest, written if there is none.

    What is new is removed if an input is refused before a shard is finished.
    """
    begun = read_manifest(folder)
    if begun is None and folder.exists() and set(os.listdir(folder)) - {_LOCK}:
        raise ConfigError(
            f"out={str(folder)!r} holds something else: choose a new or an empty folder"
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        lock(file, f"out={str(folder)!r}")
        begun = read_manifest(folder)
        if is_new := begun is None:
            _save(folder, manifest)
            begun = manifest
        for key in ("format", "shard_bytes", "record_bytes", "inputs"):
            if begun.get(key) != manifest[key]:
                raise ConfigError(
                    f"out={str(folder)!r} was begun with other {key}: choose another folder, or "
                    f"compare {MANIFEST} in it"
                )
        try:
            yield begun
        except ConfigError:
            if is_new and not (shard := _shard_path(folder, 0)).exists():
                for name in (f"{shard.name}.partial", MANIFEST, _LOCK):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # somebody put a file there
                    for path in made:
                        path.rmdir()
            raise


def _save(folder: Path, manifest: dict) -> None:
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.array_record"


def _write(folder: Path, inputs: list[str], manifest: dict) -> dict:
    resume_at, documents, num_bytes, shards = (0, 0), 0, 0, 0
    while (done := _shard_path(folder, shards)).exists():
        resume_at, more_documents, more_bytes = read_resume_point(done)
        documents, num_bytes, shards = (
            documents + more_documents,
            num_bytes + more_bytes,
            shards + 1,
        )
    writer = None
    for position, chunk in _remaining(inputs, resume_at):
        if writer is None and not chunk.text:  # an empty document
            continue
        writer = writer or ShardWriter(_shard_path(folder, shards))
        writer.add(chunk.text, chunk.ends)
        if chunk.ends and writer.num_bytes >= manifest["shard_bytes"]:
            documents, num_bytes = documents + writer.num_documents, num_bytes + writer.num_bytes
            writer.finish(position)
            writer, shards = None, shards + 1
    if writer is not None:
        documents, num_bytes = documents + writer.num_documents, num_bytes + writer.num_bytes
        writer.finish((len(inputs), 0))
        shards += 1
    if not shards:
        (folder / MANIFEST).unlink()
        raise ConfigError("files hold no text: nothing was prepared")
    names = [_shard_path(folder, i).name for i in range(shards)]
    complete = manifest | {
        "complete": True,
        "documents": documents,
        "bytes": num_bytes,
        "shards": names,
    }
    _save(folder, complete)
    return complete


def _remaining(
    inputs: list[str], resume_at: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Chunk]]:
    """Yield ((input, number of the next document in it), chunk), with a progress bar."""
    sizes = [os.path.getsize(path) for path in inputs]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing shards", total=sum(sizes))
        for i in range(resume_at[0], len(inputs)):
            before, number = sum(sizes[:i]), 1
            for chunk in read_chunks(inputs[i]):
                progress.update(task, completed=before + chunk.consumed)
                if (i, number) > resume_at:
                    yield (i, number), chunk
                number += chunk.ends
        progress.update(task, completed=sum(sizes))
