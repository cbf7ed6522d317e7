"""The Unicode property Script as a table: names with their ids, and the id of each code point.

``script_table.txt`` fixes the ids independently of the installed libraries, because the parameters
of a trained route belong to script ids. After an update of Unicode,
``python -m hnet.data.script_table`` generates the table again from fontTools (the ``test`` extra)
and keeps the ids of the scripts that are in it.
"""

import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hnet import code_points

TABLE_FILE = Path(__file__).with_name("script_table.txt")
COMMON, UNKNOWN = 0, 1  # script ids

_HEADER = """\
# Unicode {version}, property Script: a name and its code points (hexadecimal) on each line.
# The order of the lines is that of the script ids, which trained models rely on: new ones go last.
# Common holds Inherited too; what no line lists is Unknown.
# Made by `python -m hnet.data.script_table`. Data: Copyright 1991-2026 Unicode, Inc.,
# SPDX-License-Identifier: Unicode-3.0 (https://www.unicode.org/license.txt)."""


def read_table(text: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names by id, and the id of every code point, uint8 (0x110000,)."""
    return code_points.read_table(text, UNKNOWN)


def unicode_version(text: str) -> str:
    """Unicode version in the text of a table, e.g. ``18.0.0``."""
    return re.match(r"# Unicode ([0-9.]+),", text).group(1)


def library_version() -> str:
    """Unicode version of the scripts in fontTools; it can differ from its ``unidata_version``.

    Raises ImportError without fontTools.
    """
    from fontTools.unicodedata import Scripts

    return re.search(r"Scripts-([0-9.]+)\.txt", inspect.getsource(Scripts)).group(1)


def make_table(names: Sequence[str]) -> str:
    """The text of a table, generated from the installed fontTools.

    names: scripts that already have an id, in the order of ids; scripts new in Unicode are
    appended. Raises ImportError without fontTools.
    """
    from fontTools.unicodedata import Scripts

    bounds_of: dict[str, list[list[int]]] = {}
    starts = [*Scripts.RANGES, 0x110000]
    for first, end, code in zip(starts, starts[1:], Scripts.VALUES):
        name = "Common" if code == "Zinh" else Scripts.NAMES[code]
        bounds = bounds_of.setdefault(name, [])
        if bounds and bounds[-1][1] == first:
            bounds[-1][1] = end
        else:
            bounds.append([first, end])
    del bounds_of["Unknown"]
    lines = [_HEADER.format(version=library_version())]
    for name in [*names, *sorted(bounds_of.keys() - set(names))]:
        bounds = bounds_of.get(name, [])
        ranges = (f"{a:X}-{b - 1:X}" if b - a > 1 else f"{a:X}" for a, b in bounds)
        lines.append(" ".join([name, *ranges]))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Replace the table. Returns the exit code, 2 if the table cannot be generated or written."""
    part = TABLE_FILE.with_suffix(".part")
    try:
        names, _ = read_table(TABLE_FILE.read_text(encoding="utf-8"))
        part.write_text(make_table(names), encoding="utf-8")
        os.replace(part, TABLE_FILE)
    except ImportError:
        print("fontTools is not installed: install the test extra", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"{TABLE_FILE}: {e.strerror}: run it where the table can be written", file=sys.stderr)
        return 2
    print(f"{TABLE_FILE}: Unicode {library_version()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
