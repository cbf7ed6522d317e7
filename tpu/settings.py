"""Options given once per NAME, kept in STATE/NAME/settings.json and checked on write and read.

They describe the hardware, so that a slice created again is the same, spot or not.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hnet.errors import ConfigError
from hnet.files import parse_json, read_bytes

VIA = ("jobset", "xpk")
_WORD, _SWITCH, _WORDS = "a string", "true or false", "a list of strings"
REMEMBERED = {
    "project": _WORD,
    "zone": _WORD,
    "accelerator": _WORD,
    "runtime_version": _WORD,
    "spot": _SWITCH,
    "create_arg": _WORDS,
    "ssh_arg": _WORDS,
    "bucket": _WORD,
    "cluster": _WORD,
    "via": _WORD,
    "service_account": _WORD,
    "image": _WORD,
    "home": _WORD,
}
"""Check of the value per field."""
DEFAULTS = {
    "accelerator": "v5litepod-16",
    "via": VIA[0],
    "home": os.path.expanduser("~/hnet-launch"),
}
_SHOWN = 60


def settings_file(options: argparse.Namespace) -> Path:
    return Path(options.state) / options.name / "settings.json"


def recall(options: argparse.Namespace) -> None:
    """Fill in missing options from earlier commands for the same name, else with the defaults.

    Raises ConfigError for a file that `keep` cannot have written.
    """
    kept = _read(settings_file(options))
    for field in REMEMBERED:
        given = getattr(options, field, "")  # "" is given, and refused later
        if given in (None, False, []):
            setattr(options, field, kept.get(field) or DEFAULTS.get(field) or given)


def keep(options: argparse.Namespace) -> None:
    """Write the options, which must have been checked; options of other platforms are kept."""
    file = settings_file(options)
    given = {f: getattr(options, f) for f in REMEMBERED if getattr(options, f, None)}
    content = json.dumps(_read(file) | given, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(content)
        temporary.replace(file)
    except OSError as e:
        raise ConfigError(f"state: {file} cannot be written ({e.strerror})") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bytes(file))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise ConfigError(f"{file} cannot be read ({e.strerror})") from None
    except ValueError as e:
        why = f"{file} is not JSON ({e})"
        raise ConfigError(f"{why}: delete it and give all options") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no object: delete it and give all options")
    for field, value in content.items():
        if field not in REMEMBERED:
            raise ConfigError(f"{file}: field {field[:_SHOWN]!r} is unknown: remove it")
        if not _CHECKS[REMEMBERED[field]](value):
            shown = repr(value)[:_SHOWN]
            raise ConfigError(f"{file}: {field}={shown} must be {REMEMBERED[field]}")
    return content


_CHECKS: dict[str, Callable[[Any], bool]] = {
    _WORD: lambda value: isinstance(value, str),
    _SWITCH: lambda value: isinstance(value, bool),
    _WORDS: lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
}
