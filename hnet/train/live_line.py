"""The live line of a run: step, bits per byte, speed, bytes per chunk and time left."""

import math
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hnet.printable import printable
from hnet.runtime.compile_cache import CompilationLog


class LiveLine:
    """Step, bits per byte, bytes per second, bytes per chunk of each stage, time left.

    A progress bar in a terminal, otherwise a line every `seconds` seconds.
    """

    def __init__(self, total: int, start: int, *, enabled: bool = True, seconds: float = 10.0):
        self.console = Console(quiet=not enabled, highlight=False)
        self.total, self.seconds = total, seconds
        self.printed, self.compilations = time.monotonic(), CompilationLog()
        self.is_first = True
        self._from(start)
        self.bar = None
        if enabled and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("compiling", total=total, completed=start)

    def say(self, text: str) -> None:
        self.console.print(escape(printable(text)), soft_wrap=True)

    def restart(self, step: int) -> None:
        """Measure the pace, and so the time left, from this step on."""
        self._from(step)
        if self.bar:
            self.bar.update(self.task, completed=step)

    def first_step(self, step: int) -> None:
        """Note that a step has ended: the first one compiled, so the pace is that of the others."""
        if self.is_first:
            self.say(f"compiled in {time.monotonic() - self.began:.0f} s")
            self.restart(step)
            self.is_first = False

    def show(self, row: dict[str, Any]) -> None:
        chunks, s = [], 0
        while (size := row.get(f"stage{s}/bytes_per_chunk")) is not None:
            chunks.append(f"{size:.2f}")
            s += 1
        text = f"step {row['step']}/{self.total}  {row['train/bpb']:.3f} bpb  "
        text += f"{row['bytes_per_sec']:,.0f} bytes/s  {' / '.join(chunks) or '-'} bytes/chunk"
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=row["step"], description=text)
        elif now - self.printed > self.seconds or row["step"] == self.total:
            self.printed = now
            self.say(text + self._left(row["step"], now))

    def close(self) -> None:
        self.compilations.close()
        if self.bar:
            self.bar.stop()

    def compiled(self) -> float:
        """Seconds of compilation so far; JAX compiles in several threads, so at most."""
        return sum(entry.seconds for entry in self.compilations.entries)

    def _from(self, step: int) -> None:
        self.start, self.began, self.compiled_before = step, time.monotonic(), self.compiled()

    def _left(self, step: int, now: float) -> str:
        """Time left, from the steps since the first one and without compilation."""
        if step == self.start:
            return ""
        spent = max(now - self.began - (self.compiled() - self.compiled_before), 0.0)
        return f"  {_duration(spent / (step - self.start) * (self.total - step))} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
