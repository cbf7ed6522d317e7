"""What kind of pieces a segmentation emits: classes of chunks, and shares of real words.

Every figure is given twice: over *types* (distinct chunks, which is what a vocabulary has) and over
*occurrences* (emitted chunks, which is what a reader of the text meets).
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hnet.data.forms import lines_of
from hnet.errors import ConfigError

CLASSES = (
    "char_alpha", "char_other", "spaced_alpha", "spaced_other", "inner_alpha", "inner_other",
    "control", "unicode_flank", "pure_byte", "error",
)  # fmt: skip

_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class Tally:
    """How many distinct chunks and how many emitted chunks."""

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
    """every one of CLASSES"""
    scripts: dict[str, Tally]
    """chunks whose letters are all of one script, by script; and ``Mixed``"""


def chunk_class(chunk: bytes) -> str:
    """The class of a non-empty chunk, after the token classes of Qtok (nup-csai/Qtok).

    ``char_*`` one character; ``spaced_*`` more, the first a space; ``inner_*`` more without one;
    ``*_alpha`` when all the rest are letters or marks of a single script, ``*_other`` if not;
    ``control`` like <eos> or [PAD]; ``unicode_flank`` text with part of a character at an end;
    ``pure_byte`` nothing but parts of characters; ``error`` invalid UTF-8 in any other way.
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
    # up to three bytes that begin a character may be missing their rest
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
    """The script of a letter by the first word of its Unicode name, as Qtok does: "LATIN"."""
    return unicodedata.name(char, "UNKNOWN").split()[0].split("-")[0]


def vocabulary_report(chunks: Iterable[bytes]) -> VocabularyReport:
    """Classes and scripts of emitted chunks; pass all of them, repeats included."""
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
    """%TR and %Pure as shares: which chunks are words, and which are roots or morphemes."""

    words: Share
    """chunks that are a valid word of the language (the paper's %TR for Turkish)"""
    pure: Share
    """chunks that are a root or a valid morpheme (the paper's %Pure)"""


def read_lexicon(path: str | os.PathLike) -> tuple[set[str], set[str]]:
    """(words, roots and morphemes) of a file with a word per line.

    After a tab, if anything: the word's morphemes, divided by spaces; what is after another tab
    is ignored, so `gold.read_morph_words` and this read the same files. Raises ConfigError.
    """
    words, morphemes = set(), set()
    try:
        lines = [line.decode() for line in lines_of(Path(path).read_bytes())]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"lexicon={os.fspath(path)!r} cannot be read: {e}") from None
    for line in filter(str.strip, lines):
        word, *columns = line.split("\t")
        words.add(word.strip())
        morphemes |= set(columns[0].split() if columns else ())
    return words, morphemes


def turkish_lower(text: str) -> str:
    """Lower case with the Turkish pairs: I -> dotless, dotted capital -> i."""
    return text.replace("İ", "i").replace("I", "ı").lower()


def lexicon_shares(
    chunks: Iterable[bytes],
    words: Collection[str],
    morphemes: Collection[str],
    *,
    lower: Callable[[str], str] = turkish_lower,
) -> LexiconShares:
    """Shares of emitted chunks found in a lexicon, over all types and all occurrences.

    Chunks are compared without the whitespace around them, in lower case; a chunk of whitespace or
    of broken UTF-8 counts in the whole and is never found. The lexicon stands for the morphological
    analyser of the original, so figures compare only under one lexicon.
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
