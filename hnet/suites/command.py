"""Implementation of `experiments.evaluate --suite`: passages of text, progress, tables."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hnet.data import Part
from hnet.errors import ConfigError
from hnet.model import HNetLM
from hnet.printable import printable
from hnet.suites import SUITES
from hnet.suites.items import Report, Settings
from hnet.suites.scorer import ModelScorer

SHORTEST = 16  # least bytes per passage
LINE_SECONDS = 60.0  # between two lines of progress without a terminal


def check(names: Sequence[str], settings: Settings) -> None:
    """Raise ConfigError for an unknown suite or invalid settings."""
    if unknown := [name for name in names if name not in SUITES]:
        raise ConfigError(f"suite={unknown[0]!r} is unknown: use some of {', '.join(SUITES)}")
    for name, least in (("items", 1), ("shots", 0), ("max_bytes", SHORTEST)):
        if (value := getattr(settings, name)) < least:
            raise ConfigError(f"{name}={value}: use {least} or more")


def reads(names: Sequence[str], what: str) -> list[str]:
    """The suites among `names` that need this input."""
    return [name for name in names if SUITES[name].reads == what]


def passages(part: Part, settings: Settings) -> tuple[bytes, ...]:
    """Up to `items` passages of at most `max_bytes`, spread evenly over the text. Each consists of
    whole characters of one document."""
    ends = np.cumsum(np.concatenate([documents.length_D for documents in part.documents]))
    total = int(ends[-1])
    count = max(1, min(settings.items, total // settings.max_bytes))
    found = []
    for i in range(count):
        offset = i * total // count
        document = int(np.searchsorted(ends, offset, side="right"))
        first = offset - int(ends[document] - part.document_bytes(document))
        found.append(whole_characters(part.read(document, first, first + settings.max_bytes)))
    if not (texts := tuple(text for text in found if len(text) >= SHORTEST)):
        raise ConfigError(f"no document gives {SHORTEST} bytes of whole characters: give more text")
    return texts


def whole_characters(data: bytes) -> bytes:
    """UTF-8 without the bytes of incomplete characters at its ends; other bytes unchanged."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    end = len(data)
    for back in range(1, min(4, end + 1)):
        lead = data[end - back]
        if lead & 0xC0 != 0x80:
            length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return data[start : end - back if length > back else end]
    return data[start:end]


def run_suites(
    model: HNetLM, names: Sequence[str], settings: Settings, *, batch_size: int
) -> dict[str, Report]:
    """The report of each suite. Progress is shown on stderr: a bar on a terminal, else a line every
    `LINE_SECONDS`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        reports = {}
        for name in names:
            told = Told(name, bar, bar.add_task(name, total=0))
            scorer = ModelScorer(model, batch_size=batch_size, progress=told)
            reports[name] = SUITES[name].run(scorer, settings)
    return reports


class Told:
    """Progress of a suite; call it with the numbers of texts that were asked and finished now."""

    def __init__(self, name: str, bar: Progress, task: TaskID):
        self.name, self.bar, self.task = name, bar, task
        self.asked = self.done = 0
        self.began = self.said = time.monotonic()

    def __call__(self, asked: int, done: int) -> None:
        self.asked, self.done = self.asked + asked, self.done + done
        self.bar.update(self.task, total=self.asked, completed=self.done)
        now = time.monotonic()
        if self.bar.disable and self.done and now - self.said >= LINE_SECONDS:
            self.said, seconds = now, now - self.began
            left = seconds * (self.asked - self.done) / self.done
            print(
                f"{self.name}: {self.done:,} of {self.asked:,} texts asked so far, after "
                f"{seconds:,.0f} s; about {left:,.0f} s are left for these",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def print_reports(reports: dict[str, Report]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    for report in reports.values():
        for title, rows in report.items():
            if rows:
                names = list(dict.fromkeys(name for row in rows for name in row))
                table = Table(
                    *map(escape, map(printable, names)), title=escape(printable(title)), box=None
                )
                for row in rows:
                    table.add_row(*(Text(printable(_cell(row.get(name)))) for name in names))
                console.print(table, "")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
