"""Layout strings, which name the layers of a stack: runs of a letter and a count, such as T1m4.

They are those of goombalab/hnet: ``m`` = Mamba-2, ``t`` = causal attention, upper case = the same
followed by a SwiGLU MLP. The table `hnet.nn.mixers.MIXERS` has more letters.
"""

import re
import reprlib

from hnet.errors import ConfigError

_RUN = re.compile(r"([a-zA-Z])([1-9][0-9]{0,3})")


def parse_layout(layout: str) -> tuple[tuple[str, int], ...]:
    """``"T1m4"`` -> ``(("T", 1), ("m", 4))``; equal neighbours are merged into one run.

    The empty layout is a stack without layers.
    """
    if not re.fullmatch(rf"({_RUN.pattern})*", layout):
        raise ConfigError(
            f"layout {reprlib.repr(layout)} is not a sequence of runs such as 'm4' or 'T1m4': "
            "use letters of mixers, each followed by a count from 1 to 9999"
        )
    runs: list[tuple[str, int]] = []
    for kind, count in _RUN.findall(layout):
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + int(count))
        else:
            runs.append((kind, int(count)))
    return tuple(runs)


def is_class(layout: str) -> bool:
    """Whether a layout names a class of the user, "package.module:Class", instead of layers."""
    return ":" in layout


def layout_runs(layout: str) -> tuple[tuple[str, int], ...]:
    """`parse_layout`, without any run for a class of the user."""
    return () if is_class(layout) else parse_layout(layout)


def layout_height(layout: str) -> int:
    """Number of residual additions of a stack: 1 per lower-case layer, 2 per upper-case layer."""
    return sum(n * (1 + kind.isupper()) for kind, n in layout_runs(layout))
