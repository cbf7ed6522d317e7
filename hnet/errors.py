"""What ends a command with one line for people."""


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the field, its value and the remedy."""


class Failed(RuntimeError):
    """A run that cannot go on, with good settings: one line that names the fault and the remedy."""
