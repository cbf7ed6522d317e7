"""Segmentations of a run on disk: written while it trains, read a view at a time.

A run keeps three append-only files of JSON lines in ``<logdir>/boundaries/``:

* ``texts.jsonl``: a line a text, everything that does not change (`segmentation.text_json`).
* ``steps.jsonl``: a line a text and step, ``{"step", "key", "stages": [...]}``.
* ``index.jsonl``: small lines that say where the others are, each written after what it names:
  ``{"resume": step or null, "session": ns}`` when a writer opens the folder,
  ``{"text": key, "digest", "at": [offset, length], "name", "bytes", "routes", "gold"}`` and
  ``{"step", "rows": {key: [offset, length]}}``.

Later lines win: a step written again replaces the older one text by text, and ``resume`` takes back
all steps after it, which a run that went back to a checkpoint has not reached yet. A line that a
killed process left unfinished is ignored. One process writes; any number may read meanwhile.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hnet.inspect.segmentation import Segmentation, text_json

FOLDER = "boundaries"
INDEX = "index.jsonl"
TEXTS = "texts.jsonl"
STEPS = "steps.jsonl"


class SegmentationLog:
    """The writing side; opens or creates ``<logdir>/boundaries``."""

    def __init__(self, logdir: str | os.PathLike, *, resume_step: int | None = None):
        """resume_step: the step training goes on from; steps after it are taken back."""
        self.folder = Path(logdir) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        known = SegmentationIndex(self.folder)
        known.refresh()
        self._written = {key: text.get("digest") for key, text in known.texts.items()}
        self._files = {name: _open_for_append(self.folder / name) for name in (TEXTS, STEPS, INDEX)}
        self._append(INDEX, {"resume": resume_step, "session": time.time_ns()})

    def write(self, step: int, segmentations: Sequence[Segmentation]) -> None:
        """Add the segmentations of a step; flushed to the system when this returns."""
        new, rows = [], {}
        for seg in segmentations:
            static, key = text_json(seg), text_key(seg)
            digest = _digest(json.dumps(static))
            if self._written.get(key) != digest:  # a new text, or other routes or gold than before
                self._written[key] = digest
                at = self._append(TEXTS, {"key": key, **static})
                new.append({"text": key, "digest": digest, "at": at, **text_facts(seg)})
            row = {"step": int(step), "key": key, "stages": seg.to_json()["stages"]}
            rows[key] = self._append(STEPS, row)
        self.flush()
        for entry in [*new, {"step": int(step), "rows": rows}]:
            self._append(INDEX, entry)
        self.flush()

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, name: str, content: dict[str, Any]) -> list[int]:
        """Write a line; its offset and length."""
        file, line = self._files[name], json.dumps(content, separators=(",", ":")).encode()
        offset = file.tell()
        file.write(line + b"\n")
        return [offset, len(line)]


def text_key(seg: Segmentation) -> str:
    """Name of a text: the same in all runs, whatever routes or gold they know of it."""
    return _digest(json.dumps([seg.name, seg.data.hex()]))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text_facts(seg: Segmentation) -> dict[str, Any]:
    """What a list of texts shows of one."""
    return {
        "name": seg.name,
        "bytes": len(seg.data),
        "routes": list(seg.route_names()),
        "gold": sorted(seg.gold),
    }


def _open_for_append(path: Path):
    """Open at the end, behind a line end: what a killed writer left stays a line of its own."""
    file = open(path, "a+b")
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.seek(0, os.SEEK_END)
    return file


class SegmentationIndex:
    """The reading side: follows the index of one run's ``boundaries`` folder as it grows."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._forget()

    def _forget(self) -> None:
        self.texts: dict[str, dict[str, Any]] = {}
        """key -> name, bytes, routes, gold kinds, place"""
        self._rows: dict[int, dict[str, list[int]]] = {}
        self._parsed = 0
        self._head = b""

    def refresh(self) -> None:
        """Take in the lines added since the last call: one file opened, none if nothing changed."""
        try:
            size = os.path.getsize(self.folder / INDEX)
            if size == self._parsed:
                return
            with open(self.folder / INDEX, "rb") as f:
                head = f.readline()
                if head != self._head or size < self._parsed:
                    self._forget()  # another run took the place of the one that was read
                    self._head = head
                f.seek(self._parsed)
                complete, newline, _ = f.read().rpartition(b"\n")
        except OSError:
            return  # no index (yet): an empty run
        self._parsed += len(complete) + len(newline)
        for line in complete.split(b"\n"):
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "text" in entry:
                self.texts[entry["text"]] = entry
            elif "step" in entry:
                self._rows.setdefault(int(entry["step"]), {}).update(entry["rows"])
            elif entry["resume"] is not None:
                for step in [s for s in self._rows if s > entry["resume"]]:
                    del self._rows[step]
        except (ValueError, KeyError, TypeError):
            return  # the unfinished line of a killed writer

    @property
    def steps(self) -> list[int]:
        """Steps that have segmentations, increasing."""
        return sorted(self._rows)

    def keys(self, step: int) -> list[str]:
        """Keys of the texts of a step, in the order they were written."""
        return list(self._rows.get(step, ()))

    def read(self, step: int, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """JSON forms of texts at a step by key; opens two files whatever the number of keys.

        A key is missing from the result if the step has no such text or its lines are damaged.
        """
        rows = self._rows.get(step, {})
        wanted = [key for key in keys if key in rows and key in self.texts]
        if not wanted:
            return {}
        try:
            texts = _read_lines(self.folder / TEXTS, [self.texts[key]["at"] for key in wanted])
            stages = _read_lines(self.folder / STEPS, [rows[key] for key in wanted])
        except OSError:
            return {}
        views = {}
        for key, text, row in zip(wanted, texts, stages):
            if text.pop("key", None) == row.get("key") == key and row.get("step") == step:
                views[key] = {**text, "stages": row.get("stages")}
        return views


def _read_lines(path: Path, places: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The objects at (offset, length) places; an empty one where there is no whole object."""
    found = []
    with open(path, "rb") as f:
        for offset, length in places:
            f.seek(offset)
            try:
                content = json.loads(f.read(length))
            except ValueError:
                content = {}
            found.append(content if isinstance(content, dict) else {})
    return found
