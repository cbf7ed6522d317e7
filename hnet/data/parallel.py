"""Parallel text in several languages: aligned line by line, or comparable as a whole."""

import gzip
import os
import stat
import zlib
from collections.abc import Sequence

import numpy as np

from hnet.data.forms import form_of, lines_of
from hnet.data.json_lines import text_of_line
from hnet.data.scripts import SCRIPTS, script_ids
from hnet.errors import ConfigError, shown
from hnet.files import read_bytes

Lines = dict[str, list[bytes]]


def read_parallel(files: Sequence[str], *, aligned: bool = True, field: str = "files") -> Lines:
    """Read the lines of ``LANGUAGE=FILE`` entries, by language, in order.

    A file has one text per line, or JSON lines with "text"; the form is detected as for
    `data.files`. Files of the same language are concatenated. With aligned, line i has the same
    meaning in every language, and a line that is blank in one language is dropped from all.
    Otherwise each language drops its own blank lines.

    field: name of the setting in errors. Raises ConfigError for entries of another form, files that
    cannot be read and, with aligned, different numbers of lines.
    """
    lines: Lines = {}
    for entry in files:
        language, equals, path = entry.partition("=")
        if not (language and equals and path):
            raise ConfigError(f"{field}={entry!r}: write LANGUAGE=FILE")
        own = (line.strip() for line in read_lines(path, field))
        lines.setdefault(language, []).extend(own)
    if not lines:
        raise ConfigError(f"{field}=(): give LANGUAGE=FILE for each language")
    if empty := [language for language, texts in lines.items() if not any(texts)]:
        raise ConfigError(f"{field}: the files of {shown(empty[0])} hold no text: give others")
    if not aligned:
        return {language: [t for t in texts if t] for language, texts in lines.items()}
    counts = {language: len(texts) for language, texts in lines.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"{field}: the numbers of lines differ ({counts}): give files aligned line by line"
        )
    if not any(all(texts) for texts in zip(*lines.values())):
        raise ConfigError(f"{field}: no line has text in all languages: give aligned files")
    whole = [i for i, texts in enumerate(zip(*lines.values())) if all(texts)]
    return {language: [texts[i] for i in whole] for language, texts in lines.items()}


def read_lines(path: str, field: str) -> list[bytes]:
    """The texts of a file, one per line, as stored; of JSON lines, their "text".

    The form is detected as for `data.files`. Raises ConfigError for a file of another form, or one
    that cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe: it can be read once
            return lines_of(read_bytes(path))
        kind, gzipped = form_of(path)
        with (gzip.open if gzipped else open)(path, "rb") as f:
            lines = lines_of(f.read())
    except (OSError, EOFError, zlib.error) as e:
        raise ConfigError(f"{field}: {path!r}: {getattr(e, 'strerror', None) or e}") from None
    except ConfigError:
        raise
    except ValueError as e:  # it has a zero byte
        raise ConfigError(f"{field}: {path!r} is no path ({e}): give another") from None
    match kind:
        case "text":
            return lines
        case "lines":
            return [_text_of(path, number, line, field) for number, line in enumerate(lines, 1)]
        case _:
            raise ConfigError(f"{field}: {path!r} is {kind}: give text or JSON lines")


def _text_of(path: str, number: int, line: bytes, field: str) -> bytes:
    try:
        return text_of_line(line) if line.strip() else b""
    except ValueError as e:
        raise ConfigError(
            f'{field}: {path!r}: not every line is an object with "text" (line {number}: {e})'
        ) from None


def bytes_by_script(texts: Sequence[bytes]) -> np.ndarray:
    """Number of bytes per script id in the concatenated texts, int64 (len(SCRIPTS),)."""
    return np.bincount(script_ids(b"".join(texts))[0], minlength=len(SCRIPTS))
