"""What ends a command with one line for people."""


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the field, its value and the remedy."""
