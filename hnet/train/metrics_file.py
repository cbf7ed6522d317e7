"""metrics.jsonl: one JSON object per line, appended by one process; survives disk errors."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from hnet.errors import Failed
from hnet.files import json_text, parse_json, read_bytes, without_nan
from hnet.train.log_folder import METRICS

Row = dict[str, Any]


def read_metrics(workdir: str | os.PathLike) -> list[Row]:
    """The rows of metrics.jsonl, without incomplete and damaged lines; [] if there is no file."""
    try:
        content = read_bytes(epath.Path(workdir) / METRICS)
    except OSError:
        return []
    return [row for row in map(_parsed, content.split(b"\n")) if row is not None]


def _parsed(line: bytes) -> Row | None:
    """The row of a line, NaN of earlier versions replaced by None; None if the line is damaged."""
    try:
        row = parse_json(line)
    except ValueError:  # UnicodeDecodeError is a ValueError
        return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int
    return without_nan(row) if is_row else None


class MetricsFile:
    """Writes each row immediately. If that fails, as on a full disk, rows are kept and retried.

    When a run resumes, the rows of steps that it repeats and an incomplete last line are dropped.
    Damaged lines are dropped too; a copy of the file with them is kept under another name.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None] = print):
        """step: step that the run continues from. Raises Failed if the file cannot be written."""
        self.path, self._say = folder / METRICS, say
        self._size = 0  # bytes of complete lines in the file
        self._waiting: list[bytes] = []
        self._is_failing = False
        self.go_back(step)

    def write(self, row: Row) -> None:
        self._waiting.append(_line(row))
        self._flush()

    def amend(self, step: int, values: Row) -> None:
        """Add values to the last row if that is the row of `step`."""
        rows = read_metrics(self.path.parent)
        if rows and rows[-1]["step"] == step and not self._waiting:
            rows[-1] |= values
            with self._guarded():
                self._replace(rows)

    def go_back(self, step: int) -> None:
        """Drop the rows of later steps. Raises Failed if they cannot be dropped."""
        self._waiting = [line for line in self._waiting if _parsed(line)["step"] <= step]
        try:
            content, rows, damaged = self._content(), [], 0
            for line in content.split(b"\n")[:-1]:  # the last part is empty or an incomplete line
                row = _parsed(line)
                damaged += row is None
                if row is not None and row["step"] <= step:
                    rows.append(row)
            if damaged:
                shutil.copyfile(self.path, aside := _free_name(self.path))
                what = "line is" if damaged == 1 else "lines are"
                them = "it" if damaged == 1 else "them"
                self._say(
                    f"{self.path}: {damaged} damaged {what} left out, {aside.name} has {them}"
                )
            self._replace(rows, content)
        except OSError as e:
            raise Failed(f"{self.path} cannot be written ({e.strerror})") from None

    def _content(self) -> bytes:
        if not os.path.lexists(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return b""
        if self.path.is_file():
            return self.path.read_bytes()
        self.path.rename(aside := _free_name(self.path))
        self._say(f"{self.path} is no file: it is now {aside.name}")
        return b""

    def close(self) -> None:
        """Try once more to write the rows that are waiting."""
        self._flush()
        if self._waiting:
            many = len(self._waiting)
            self._say(f"{self.path}: {many} row{'s are' if many > 1 else ' is'} lost")

    def _replace(self, rows: list[Row], content: bytes = b"") -> None:
        new = b"".join(map(_line, rows))
        if new != content:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(new)
            temporary.replace(self.path)
        self._size = len(new)

    def _flush(self) -> None:
        if not self._waiting:
            return
        with self._guarded(), open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as f:
            f.seek(min(self._size, f.seek(0, os.SEEK_END)))
            f.truncate()  # remove an incomplete line
            f.write(b"".join(self._waiting))
            f.flush()
            self._size, self._waiting = f.tell(), []

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Report when writing starts to fail and when it works again."""
        try:
            yield
        except OSError as e:
            if not self._is_failing:
                self._say(f"{self.path} cannot be written ({e.strerror}): rows are kept until then")
            self._is_failing = True
        else:
            if self._is_failing:
                self._say(f"{self.path} is written again")
            self._is_failing = False


def _line(row: Row) -> bytes:
    return json_text(row).encode() + b"\n"


def _free_name(path: Path) -> Path:
    n = 1
    while os.path.lexists(free := path.with_name(f"{path.name}.aside-{n}")):
        n += 1
    return free
