"""Implementation of `experiments.evaluate --suite`: passages of text, progress, tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
    """The report of each suite. Progress is shown if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        reports = {}
        for name in names:
            task = bar.add_task(name, total=0)
            done = [0, 0]

            def progress(asked, finished, task=task, done=done):
                done[0], done[1] = done[0] + asked, done[1] + finished
                bar.update(task, total=done[0], completed=done[1])

            scorer = ModelScorer(model, batch_size=batch_size, progress=progress)
            reports[name] = SUITES[name].run(scorer, settings)
    return reports


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
