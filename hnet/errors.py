"""Errors that end a command with a one-line message, and what stands in such a line."""

import reprlib
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the field, its value and the remedy."""


class Failed(RuntimeError):
    """A run with valid settings that cannot go on: one line that names the fault and the remedy."""


def first_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def shown(value: Any) -> str:
    """`repr`, shortened to fit into a line for a value of any size or depth."""
    return _SHORT.repr(value)


def told(value: Any) -> str:
    """`shown`; for a list of objects, such as stages, their number."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return f"({len(value)} of them)"
    return shown(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 6
