"""Errors that end a command with a one-line message."""


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the field, its value and the remedy."""


class Failed(RuntimeError):
    """A run with valid settings that cannot go on: one line that names the fault and the remedy."""
