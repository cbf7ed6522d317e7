"""Errors that end a command with a one-line message."""


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the field, its value and the remedy."""


class Failed(RuntimeError):
    """A run with valid settings that cannot go on: one line that names the fault and the remedy."""


def first_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
