"""What fields of a configuration accept: `Annotated[int, Bounds(1)]`, and names of files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from hnet.errors import ConfigError, shown

_MOST = 2**53  # integers up to this are exact in every JSON reader
_MOST_32 = 2**31 - 1
_MOST_FLOAT = 3.4e38  # larger numbers are infinite in float32
_LONGEST_PATH = 3500  # bytes; files in a folder of this length keep within Linux's 4096


@dataclass(frozen=True)
class Bounds:
    """Range of the finite numbers that a field accepts: `Annotated[int, Bounds(1)]`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = f"above {self.above:.10g}" if self.above > -math.inf else f"{self.least:.10g}"
        if self.below < math.inf:
            return f"{low} to below {self.below:.10g}"
        if self.most < _MOST_32:
            return f"{low} to {self.most:.10g}"
        return low if self.above > -math.inf else f"{low} or more"

    def remedy(self, value: float) -> str:
        return f"use at most {self.most}" if value > self.most else f"use {self}"


@dataclass(frozen=True)
class NamesFile:
    """Mark of a text field that names a file or folder: `Annotated[str, NamesFile()]`."""

    def problem(self, value: str) -> str:
        """What is wrong with a value, and the remedy; "" if it can be a path."""
        if not value or "\0" in value:
            return "it is no path: give one"
        if len(value.encode("utf-8", "surrogatepass")) > _LONGEST_PATH:
            return f"it is too long: use at most {_LONGEST_PATH} bytes"
        return ""


FilePath = Annotated[str, NamesFile()]
"""Name of a file or folder: not empty, and short enough."""
Count = Annotated[int, Bounds(1, _MOST_32)]
"""An integer of at least 1 that fits into 32 bits."""
Natural = Annotated[int, Bounds(0, _MOST_32)]
"""An integer of at least 0 that fits into 32 bits."""
Rows = Annotated[int, Bounds(1, 65536)]
"""Number of rows that run together."""
RowLength = Annotated[int, Bounds(8, 1 << 24)]
"""Positions per row of a measurement."""
Width = Annotated[int, Bounds(1, 1 << 16)]
"""Channels of a network that a measurement makes."""
Repeats = Annotated[int, Bounds(1, 10_000)]
"""Number of measurements of one thing, or of runs."""
Vocabulary = Annotated[int, Bounds(257, 1 << 20)]
"""Number of tokens that a tokenizer learns, with the 256 bytes."""
ChunkBytes = Annotated[float, Bounds(above=1, most=1e6)]
"""Mean bytes per chunk."""
Share = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(above=0, most=1e12)]
NotNegative = Annotated[float, Bounds(0, 1e12)]
Seconds = Annotated[float, Bounds(0, 1e9)]
"""Seconds that a thread can wait."""


def names_file(marks: Sequence[Any]) -> bool:
    """Whether a type with these marks is that of a file or folder."""
    return any(isinstance(mark, NamesFile) for mark in marks)


def check_marks(value: Any, marks: Sequence[Any], path: str) -> None:
    """Raise ConfigError for a number out of bounds, or for a text that cannot be a path."""
    if isinstance(value, str):
        if names_file(marks) and (problem := NamesFile().problem(value)):
            raise ConfigError(f"{path}={shown(value)}: {problem}")
    else:
        check_number(value, marks, path)


def check_number(value: Any, bounds: Sequence[Any], path: str) -> None:
    """Raise ConfigError for a number that is not finite, too large for JSON, or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if abs(value) > _MOST and isinstance(value, int):
        raise ConfigError(f"{path}={shown(value)}: use at most 2**53")
    if not math.isfinite(value):
        raise ConfigError(f"{path}={value}: use a finite number")
    if abs(value) > _MOST_FLOAT:
        raise ConfigError(f"{path}={value}: use at most {_MOST_FLOAT}")
    for bound in bounds:
        if isinstance(bound, Bounds) and not bound.hold(value):
            raise ConfigError(f"{path}={value}: {bound.remedy(value)}")
