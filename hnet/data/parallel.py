"""Text in several languages that says the same: aligned line by line, or comparable as a whole."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hnet.data.scripts import SCRIPTS, script_ids
from hnet.errors import ConfigError

Lines = dict[str, list[bytes]]


def read_parallel(files: Sequence[str], *, aligned: bool = True, field: str = "files") -> Lines:
    """The lines of ``LANGUAGE=FILE`` entries, by language, in their order.

    A file has a text a line; if it ends in .jsonl, an object with "text". A language that is named
    again goes on with the next file. Aligned, line i says the same in every language, and a line
    that is blank in one language is left out of all; otherwise blank lines are left out.

    Raises ConfigError, which calls the setting `field`, for entries of another form, files that
    cannot be read, and numbers of lines that differ.
    """
    lines: Lines = {}
    for entry in files:
        language, equals, path = entry.partition("=")
        if not (language and equals and path):
            raise ConfigError(f"{field}={entry!r}: write LANGUAGE=FILE")
        lines.setdefault(language, []).extend(_read_lines(path, field))
    if not lines:
        raise ConfigError(f"{field}=(): give LANGUAGE=FILE for each language")
    if not aligned:
        return {language: [t for t in texts if t] for language, texts in lines.items()}
    counts = {language: len(texts) for language, texts in lines.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"{field}: the numbers of lines differ ({counts}): give files aligned line by line"
        )
    whole = [i for i, texts in enumerate(zip(*lines.values())) if all(texts)]
    return {language: [texts[i] for i in whole] for language, texts in lines.items()}


def _read_lines(path: str, field: str) -> list[bytes]:
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{field}: {path!r}: {e.strerror}") from None
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if not path.endswith(".jsonl"):
        return [line.strip() for line in lines]
    try:
        return [json.loads(line)["text"].strip().encode() for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{field}: {path!r}: not every line is an object with "text"') from None


def bytes_by_script(texts: Sequence[bytes]) -> np.ndarray:
    """Bytes of each script id in texts that follow one another, int64 (len(SCRIPTS),)."""
    return np.bincount(script_ids(b"".join(texts))[0], minlength=len(SCRIPTS))
