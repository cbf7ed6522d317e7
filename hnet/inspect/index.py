"""Reader of the segmentations of a run on disk; see `store` for the file format.

Damage is expected: a line that cannot be read is skipped.
"""

import base64
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnet.errors import ConfigError
from hnet.files import parse_json
from hnet.inspect.segmentation import Segmentation

FOLDER = "boundaries"
INDEX = "index.jsonl"
TEXTS = "texts.jsonl"
STEPS = "steps.jsonl"
Place = tuple[int, int]
"""Offset and length of a line."""


@dataclass(frozen=True)
class TextEntry:
    """Entry of a text in the index."""

    name: str
    bytes: int
    routes: tuple[str, ...]
    gold: tuple[str, ...]
    at: Place
    digest: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "TextEntry":
        """Read the JSON form. Raises ValueError for a damaged line."""
        return cls(
            name=_string(entry.get("name")),
            bytes=_whole(entry.get("bytes")),
            routes=_strings(entry.get("routes")),
            gold=_strings(entry.get("gold")),
            at=_place(entry.get("at")),
            digest=_string(entry.get("digest", "")),
        )

    def facts(self) -> dict[str, Any]:
        """Facts for a list of texts."""
        return {"name": self.name, "bytes": self.bytes,
                "routes": list(self.routes), "gold": list(self.gold)}  # fmt: skip


class SegmentationIndex:
    """Reader that follows the index in the ``boundaries`` folder of a run as it grows."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._forget()

    def _forget(self) -> None:
        self.texts: dict[str, TextEntry] = {}
        self.damaged = 0
        """Number of damaged lines, without unfinished lines of killed writers."""
        self._is_torn = False
        self._rows: dict[int, dict[str, Place]] = {}
        self._parsed = 0
        self._head = b""

    def refresh(self) -> None:
        """Read the lines added since the last call; opens one file, or none if nothing changed."""
        try:
            path = self.folder / INDEX
            size = os.path.getsize(path)
            if size == self._parsed or not os.path.isfile(path):
                return
            with open(path, "rb") as f:
                head = f.readline()
                if head != self._head or size < self._parsed:
                    self._forget()  # another run replaced the index
                    self._head = head
                f.seek(self._parsed)
                complete, newline, _ = f.read().rpartition(b"\n")
        except OSError:
            return  # no index (yet): an empty run
        self._parsed += len(complete) + len(newline)
        for line in complete.split(b"\n"):
            self._take(line)

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            kind = self._take_entry(parse_object(line))
        except ValueError:
            self.damaged += 1
            self._is_torn = True
            return
        if kind == "resume" and self._is_torn:  # a killed writer left the previous line unfinished
            self.damaged -= 1
        self._is_torn = False

    def _take_entry(self, entry: dict[str, Any]) -> str:
        if "text" in entry:
            self.texts[_string(entry["text"])] = TextEntry.from_json(entry)
            return "text"
        if "step" in entry:
            rows = entry.get("rows")
            if not isinstance(rows, dict):
                raise ValueError("no rows")
            found = {key: _place(at) for key, at in rows.items()}
            self._rows.setdefault(_whole(entry["step"]), {}).update(found)
            return "step"
        if "resume" not in entry:
            raise ValueError("no kind of line")
        if entry["resume"] is not None:
            last = _whole(entry["resume"], least=-1)
            for step in [s for s in self._rows if s > last]:
                del self._rows[step]
        return "resume"

    @property
    def steps(self) -> list[int]:
        """Steps that have segmentations, increasing."""
        return sorted(self._rows)

    def keys(self, step: int) -> list[str]:
        """Keys of the texts of a step, in the order in which they were written."""
        return list(self._rows.get(step, ()))

    def read_texts(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The constant parts of texts, by key; damaged texts are missing."""
        places = {key: self.texts[key].at for key in keys if key in self.texts}
        return _read_lines(self.folder / TEXTS, places)

    def search(self, query: str) -> list[str]:
        """Keys of the texts that contain the query, ignoring case."""
        wanted = query.lower()
        return [
            key
            for key, text in self.read_texts(self.texts).items()
            if wanted in _text(text).lower()
        ]

    def read(self, step: int, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """JSON forms of texts at a step, by key; opens two files for any number of keys.

        A key is missing from the result if the step has no such text or its lines are damaged, so
        `Segmentation.from_json` can read every value.
        """
        rows = self._rows.get(step, {})
        texts = self.read_texts(key for key in keys if key in rows)
        stages = _read_lines(self.folder / STEPS, {key: rows[key] for key in texts})
        views = {}
        for key, row in stages.items():
            if row.get("step") == step:
                with contextlib.suppress(ConfigError):
                    whole = Segmentation.from_json({**texts[key], **row})
                    views[key] = whole.to_json()
        return views


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for anything else."""
    content = parse_json(line)
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content


def _text(content: dict[str, Any]) -> str:
    """The characters of a text in JSON form, with U+FFFD for invalid bytes."""
    try:
        if isinstance(text := content.get("text"), str):
            return text
        return base64.b64decode(content["base64"]).decode(errors="replace")
    except (KeyError, TypeError, ValueError):
        return ""


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no string")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("no list")
    return tuple(map(_string, value))


def _whole(value: Any, least: int = 0) -> int:
    """Check that a value is an integer from `least` to 2**53 - 1, exact in every JSON reader."""
    if type(value) is not int or not least <= value < 1 << 53:
        raise ValueError("no whole number")
    return value


def _place(value: Any) -> Place:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("no place")
    return _whole(value[0]), _whole(value[1])


def _read_lines(path: Path, places: Mapping[str, Place]) -> dict[str, dict[str, Any]]:
    """The objects at (offset, length) places, by key; skips objects with another "key"."""
    found = {}
    try:
        size = os.path.getsize(path) if places and path.is_file() else 0
        with open(path, "rb") if size else contextlib.nullcontext() as f:
            for key, (offset, length) in places.items():
                if offset + length > size:
                    continue
                f.seek(offset)
                with contextlib.suppress(ValueError):
                    content = parse_object(f.read(length))
                    if content.get("key") == key:
                        found[key] = content
    except OSError:
        return {}
    return found
