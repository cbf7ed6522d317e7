"""Segmentations of a run on disk: written during training, read one view at a time.

A run keeps three append-only files of JSON lines in ``<logdir>/boundaries/``:

* ``texts.jsonl``: one line per text with its constant part (`segmentation.text_json`).
* ``steps.jsonl``: one line per text and step with ``{"step", "key"}`` and the part that changes
  (`segmentation.step_json`).
* ``index.jsonl``: short lines with the places of the other lines, written after the lines they
  name:
  ``{"resume": step or null, "session": ns}`` when a writer opens the folder or goes back,
  ``{"text": key, "digest", "at": [offset, length], "name", "bytes", "routes", "gold"}`` and
  ``{"step", "rows": {key: [offset, length]}}``.

Later lines override earlier ones: a step that is written again replaces the older one text by text,
and ``resume`` invalidates all steps after it, which a run that went back to a checkpoint has not
reached yet. A line that a killed process left unfinished is ignored. Other damaged lines are
ignored and counted. One process writes; any number of processes may read at the same time.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hnet.files import json_text
from hnet.inspect.index import FOLDER, INDEX, STEPS, TEXTS, SegmentationIndex
from hnet.inspect.segmentation import Segmentation, step_json, text_json


class SegmentationLog:
    """Writer; opens or creates ``<logdir>/boundaries``."""

    def __init__(self, logdir: str | os.PathLike, *, resume_step: int | None = None):
        """resume_step: step from which training continues; steps after it are invalidated.

        Raises OSError for a folder that cannot be written.
        """
        self.folder = Path(logdir) / FOLDER
        self.notes: list[str] = []
        """Damage found in the folder, one line per problem."""
        self._make_room()
        known = SegmentationIndex(self.folder)
        known.refresh()
        if known.damaged:
            s, are = ("s", "are") if known.damaged > 1 else ("", "is")
            self.notes.append(
                f"{self.folder / INDEX}: {known.damaged} damaged line{s} {are} left out"
            )
        whole = known.read_texts(known.texts)
        self._written = {key: known.texts[key].digest for key in whole}
        with contextlib.ExitStack() as opened:
            self._files = {
                name: opened.enter_context(_open_for_append(self.folder / name))
                for name in (TEXTS, STEPS, INDEX)
            }
            self.go_back(resume_step)
            self._opened = opened.pop_all()

    def _make_room(self) -> None:
        """Rename whatever is at the path of the folder or a file but is not a folder or file."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            self._set_aside(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (TEXTS, STEPS, INDEX):
            path = self.folder / name
            if os.path.lexists(path) and not path.is_file():
                self._set_aside(path)

    def _set_aside(self, path: Path) -> None:
        n = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{n}")):
            n += 1
        path.rename(aside)
        self.notes.append(f"{path} is not what it must be: it is now {aside.name}")

    def go_back(self, step: int | None) -> None:
        """Invalidate all steps after `step`; None: no step."""
        self._append(INDEX, {"resume": step, "session": time.time_ns()})
        self.flush()

    def write(self, step: int, segmentations: Sequence[Segmentation]) -> None:
        """Add the segmentations of a step and flush them to the operating system."""
        new, rows = [], {}
        for seg in segmentations:
            static, key = text_json(seg), text_key(seg)
            digest = _digest(json_text(static))
            if self._written.get(key) != digest:  # a new text, or changed routes or gold
                at = self._append(TEXTS, {"key": key, **static})
                new.append({"text": key, "digest": digest, "at": at, **text_facts(seg)})
            row = {"step": int(step), "key": key, **step_json(seg)}
            rows[key] = self._append(STEPS, row)
        self.flush()
        for entry in [*new, {"step": int(step), "rows": rows}]:
            self._append(INDEX, entry)
        self.flush()
        self._written |= {entry["text"]: entry["digest"] for entry in new}

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        self._opened.close()

    def _append(self, name: str, content: dict[str, Any]) -> list[int]:
        """Write a line. Returns its offset and length."""
        file, line = self._files[name], json_text(content, separators=(",", ":")).encode()
        offset = file.tell()
        file.write(line + b"\n")
        return [offset, len(line)]


def text_key(seg: Segmentation) -> str:
    """Key of a text: the same in all runs, independent of its routes and gold boundaries."""
    return _digest(json_text([seg.name, seg.data.hex()]))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text_facts(seg: Segmentation) -> dict[str, Any]:
    """Facts of a text for a list of texts."""
    return {
        "name": seg.name,
        "bytes": len(seg.data),
        "routes": list(seg.route_names()),
        "gold": sorted(seg.gold),
    }


def _open_for_append(path: Path):
    """Open for appending after a line end; an unfinished line of a killed writer gets one."""
    file = open(path, "a+b")
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.seek(0, os.SEEK_END)
    return file
