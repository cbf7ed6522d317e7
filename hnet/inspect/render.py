"""A segmentation as text: colours in a terminal, marks in a pipe, Markdown in a summary.

Plain text marks the start of every chunk except the first: ``|`` for stage 0, ``‖`` where stage 1
also starts a chunk, ``⦀`` for stage 2 and deeper. It can be read back without loss. Marks and
backslashes of the text itself are preceded by a backslash; a line end is ``\\n`` followed by a real
line end; a tab is ``\\t``. Bytes and characters without a visible shape are escaped: invalid bytes
and the bytes of a character with a boundary inside as ``\\xNN``, control and direction characters
as ``\\u{NNNN}``.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from hnet.inspect.metrics import chunk_length_stats
from hnet.inspect.segmentation import Segmentation, characters, is_invalid
from hnet.printable import printable

MARKS = ("|", "‖", "⦀")
_JOINERS = "\u200c\u200d"  # they change the shape of adjacent letters, so they are not escaped
_TINTS = ("black on #9ed2f0", "black on #f7cf86")  # Okabe-Ito sky blue and orange, lightened
_MARK_STYLE = "bold white on #0072b2"
_ESCAPE_STYLE = "bold #d55e00"
_WIDTH = 100


class Piece(NamedTuple):
    """One character, or one byte of an invalid or split character."""

    start: int
    level: int
    """deepest stage that starts a chunk here; -1 = none"""
    text: str
    """displayed form"""
    escaped: bool


def pieces(seg: Segmentation) -> Iterator[Piece]:
    """Yield the text in order: one piece per character, or per byte of a split character."""
    level_at = dict.fromkeys(range(len(seg.data) + 1), -1)
    for level, stage in enumerate(seg.stages):
        level_at.update(dict.fromkeys(stage.starts[1:], level))
    for start, end, char in characters(seg.data):
        if is_invalid(char) or any(level_at[o] >= 0 for o in range(start + 1, end)):
            for o in range(start, end):
                yield Piece(o, level_at[o], f"\\x{seg.data[o]:02x}", True)
        else:
            shown = _shown(char)
            yield Piece(start, level_at[start], shown, shown != char)


def _shown(char: str) -> str:
    if char in "\\" + "".join(MARKS):
        return "\\" + char
    if char in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n\n", "\r": "\\r"}[char]
    if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs") and char not in _JOINERS:
        return f"\\u{{{ord(char):04x}}}"
    return char


def to_plain(seg: Segmentation) -> str:
    """The text with its marks; see the docstring of the module."""
    return "".join(_mark(piece.level) + piece.text for piece in pieces(seg))


def _mark(level: int) -> str:
    return MARKS[min(level, len(MARKS) - 1)] if level >= 0 else ""


def to_rich(seg: Segmentation) -> Text:
    """Chunks of stage 0 in two tints, deeper boundaries as marks between them."""
    # One span per run of a style: a letter in a span of its own loses its joined shape.
    return Text().join(
        Text("".join(text for _, text in group), style)
        for style, group in itertools.groupby(_styled(seg), key=lambda pair: pair[0])
    )


def _styled(seg: Segmentation) -> Iterator[tuple[str, str]]:
    chunk = 0
    for piece in pieces(seg):
        chunk += piece.level >= 0
        if piece.level >= 1:
            yield _MARK_STYLE, _mark(piece.level)
        shown, newline, _ = piece.text.partition("\n")
        tint = _TINTS[chunk % 2] if seg.stages else ""
        yield (_ESCAPE_STYLE + tint.removeprefix("black") if piece.escaped else tint), shown
        if newline:
            yield "", newline


def describe(seg: Segmentation) -> str:
    """One line: the bytes, bits per byte, and chunks and bytes per chunk of each stage."""
    parts = [f"{len(seg.data)} bytes"]
    if seg.bits:
        parts.append(f"{sum(seg.bits) / len(seg.bits):.2f} bits per byte")
    for i in range(len(seg.stages)):
        if stats := chunk_length_stats(seg.chunk_lengths(i)):
            count = len(seg.stages[i].starts)
            chunks = f"{count} chunk{'s' * (count != 1)}, {stats['mean']:.2f} bytes per chunk"
            parts.append(f"stage {i}: {chunks}, longest {stats['longest']:.0f}")
    return "; ".join(parts)


def print_segmentations(segmentations: Iterable[Segmentation], console: Console | None = None):
    """Write texts to a console: with colours if it is a terminal with colours, else with marks."""
    console = console or Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    for seg in segmentations:
        title = "".join(_shown(c) for c in seg.name)
        console.print(Text(f"{printable(title)}  ({describe(seg)})", "bold"), soft_wrap=True)
        console.print(to_rich(seg) if coloured else Text(to_plain(seg)), soft_wrap=True)
        console.print()


def to_markdown(seg: Segmentation) -> str:
    """A Markdown summary with marked boundaries: a title line and an indented code block.

    Every line of the text is indented, so it cannot leave the block; the name is escaped character
    by character.
    """
    name = re.sub(r"([^\w\s])", lambda m: f"&#{ord(m[1])};", "".join(map(_shown, seg.name)))
    lines = [
        line[i : i + _WIDTH]
        for line in to_plain(seg).split("\n")
        for i in range(0, max(len(line), 1), _WIDTH)
    ]
    title = f"**{' '.join(name.split()) or 'text'}** ({describe(seg)})"
    return title + "\n\n" + "\n".join("    " + line for line in lines)
