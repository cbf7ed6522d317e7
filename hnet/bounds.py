"""Bounds of the numbers in a configuration: `Annotated[int, Bounds(1)]`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from hnet.errors import ConfigError, shown

_MOST = 2**53  # integers up to this are exact in every JSON reader
_MOST_32 = 2**31 - 1
_MOST_FLOAT = 3.4e38  # larger numbers are infinite in float32


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
        low = f"above {self.above:g}" if self.above > -math.inf else f"{self.least:g}"
        if self.below < math.inf:
            return f"{low} to below {self.below:g}"
        if self.most < _MOST_32:
            return f"{low} to {self.most:g}"
        return low if self.above > -math.inf else f"{low} or more"

    def remedy(self, value: float) -> str:
        return f"use at most {self.most}" if value > self.most else f"use {self}"


Count = Annotated[int, Bounds(1, _MOST_32)]
"""An integer of at least 1 that fits into 32 bits."""
Natural = Annotated[int, Bounds(0, _MOST_32)]
"""An integer of at least 0 that fits into 32 bits."""
Rows = Annotated[int, Bounds(1, 65536)]
"""Number of rows that run together."""
Share = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(above=0, most=1e12)]
NotNegative = Annotated[float, Bounds(0, 1e12)]
Seconds = Annotated[float, Bounds(0, 1e9)]
"""Seconds that a thread can wait."""


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
