"""Classes of chunks, and shares of chunks that are words.

Every figure has two values: over *types* (distinct chunks, as in a vocabulary) and over
*occurrences* (all emitted chunks, as in the text).
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from hnet.data.forms import lines_of
from hnet.errors import ConfigError
from hnet.files import read_bytes

CLASSES = (
    "char_alpha", "char_other", "spaced_alpha", "spaced_other", "inner_alpha", "inner_other",
    "control", "unicode_flank", "pure_byte", "error",
)  # fmt: skip

_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class Tally:
    """Number of distinct chunks and number of emitted chunks."""

    types: int = 0
    occurrences: int = 0

    def share_of(self, whole: "Tally") -> "Share":
        return Share(
            self.types / whole.types if whole.types else 0.0,
            self.occurrences / whole.occurrences if whole.occurrences else 0.0,
        )


@dataclass(frozen=True)
class Share:
    """A share of all distinct chunks and of all emitted chunks, 0 to 1."""

    types: float
    occurrences: float


@dataclass(frozen=True)
class VocabularyReport:
    """Tallies of a multiset of chunks."""

    total: Tally
    classes: dict[str, Tally]
    """tally of each class in CLASSES"""
    scripts: dict[str, Tally]
    """tally of the chunks with letters of one script, by script; ``Mixed``: of several"""


def chunk_class(chunk: bytes) -> str:
    """The class of a non-empty chunk, after the token classes of Qtok (nup-csai/Qtok).

    ``char_*``: one character. ``spaced_*``: several characters, the first a space. ``inner_*``:
    several characters, the first not a space. ``*_alpha``: all of them (without that space) are
    letters or marks of one script; otherwise ``*_other``. ``control``: like <eos> or [PAD].
    ``unicode_flank``: text with a part of a character at an end. ``pure_byte``: only parts of
    characters. ``error``: other invalid UTF-8.
    """
    try:
        text = chunk.decode()
    except UnicodeDecodeError:
        return _undecodable_class(chunk)
    if len(text) == 1:
        return "char_alpha" if text.isalpha() else "char_other"
    if _CONTROL.fullmatch(text):
        return "control"
    place, body = ("spaced", text[1:]) if text[0] == " " else ("inner", text)
    return f"{place}_alpha" if _one_script(body) else f"{place}_other"


def _undecodable_class(chunk: bytes) -> str:
    body = chunk.lstrip(bytes(range(0x80, 0xC0)))
    # Up to three bytes at the end may be the beginning of an incomplete character.
    for cut in range(min(3, len(body)) + 1):
        tail = body[len(body) - cut :]
        if (not cut or _begins_character(tail)) and _decodes(body[: len(body) - cut]):
            return "unicode_flank" if len(body) > cut else "pure_byte"
    return "error"


def _begins_character(tail: bytes) -> bool:
    try:
        tail.decode()
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data"
    return False


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _one_script(text: str) -> bool:
    return all(c.isalpha() or unicodedata.category(c)[0] == "M" for c in text) and (
        len({script_word(c) for c in text if c.isalpha()}) == 1
    )


def script_word(char: str) -> str:
    """The script of a letter: first word of its Unicode name, as in Qtok, e.g. "LATIN"."""
    return unicodedata.name(char, "UNKNOWN").split()[0].split("-")[0]


def vocabulary_report(chunks: Iterable[bytes]) -> VocabularyReport:
    """Classes and scripts of emitted chunks; pass all chunks, including repeated ones."""
    counts = Counter(chunk for chunk in chunks if chunk)
    classes = {name: Tally() for name in CLASSES}
    scripts: dict[str, Tally] = {}
    for chunk, n in counts.items():
        _add(classes, chunk_class(chunk), n)
        letters = {script_word(c) for c in chunk.decode(errors="ignore") if c.isalpha()}
        if letters:
            _add(scripts, letters.pop() if len(letters) == 1 else "Mixed", n)
    return VocabularyReport(
        Tally(len(counts), counts.total()), classes, dict(sorted(scripts.items()))
    )


def _add(tallies: dict[str, Tally], name: str, n: int) -> None:
    old = tallies.get(name, Tally())
    tallies[name] = Tally(old.types + 1, old.occurrences + n)


@dataclass(frozen=True)
class LexiconShares:
    """%TR and %Pure as shares: chunks that are words, and chunks that are roots or morphemes."""

    words: Share
    """share of chunks that are a valid word of the language (%TR of the paper, for Turkish)"""
    pure: Share
    """share of chunks that are a root or a valid morpheme (%Pure of the paper)"""


def read_lexicon(path: str | os.PathLike) -> tuple[set[str], set[str]]:
    """Read (words, roots and morphemes) from a file with one word per line.

    An optional second column, after a tab, has the morphemes of the word, separated by spaces.
    Further columns are ignored, so files of `gold.read_morph_words` can be read too. Raises
    ConfigError if the file cannot be read.
    """
    words, morphemes = set(), set()
    try:
        lines = [line.decode() for line in lines_of(read_bytes(path))]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"lexicon={os.fspath(path)!r} cannot be read: {e}") from None
    for line in filter(str.strip, lines):
        word, *columns = line.split("\t")
        words.add(word.strip())
        morphemes |= set(columns[0].split() if columns else ())
    if not words:
        raise ConfigError(f"lexicon={os.fspath(path)!r} holds no word: give a word per line")
    return words, morphemes


def turkish_lower(text: str) -> str:
    """Lower case with the Turkish pairs: I -> dotless i, dotted capital I -> i."""
    return text.replace("İ", "i").replace("I", "ı").lower()


def lexicon_shares(
    chunks: Iterable[bytes],
    words: Collection[str],
    morphemes: Collection[str],
    *,
    lower: Callable[[str], str] = turkish_lower,
) -> LexiconShares:
    """Shares of emitted chunks found in a lexicon, over all types and all occurrences.

    Chunks are compared in lower case, without surrounding whitespace. Chunks of only whitespace or
    with invalid UTF-8 count in the total and are never found. The lexicon replaces the
    morphological analyser of the paper, so figures are comparable only with the same lexicon.
    """
    counts = Counter(chunk for chunk in chunks if chunk)
    known_words, known_parts = ({lower(entry) for entry in found} for found in (words, morphemes))
    tallies = {"words": Tally(), "pure": Tally()}
    for chunk, n in counts.items():
        text = lower(chunk.decode(errors="replace").strip())
        if text in known_words:
            _add(tallies, "words", n)
        if text in known_parts:
            _add(tallies, "pure", n)
    total = Tally(len(counts), counts.total())
    return LexiconShares(*(tally.share_of(total) for tally in tallies.values()))
