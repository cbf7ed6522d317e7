"""The words of hat-splitter, as starts: each is known at the first character of a word."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from hnet.chunking.automaton import Automaton
from hnet.chunking.part import PredictorConfig
from hnet.chunking.predictors.words import CharacterRule


class Character(NamedTuple):
    """What the rule needs to know of a character."""

    token: str
    """kind of the token that it is if it is one: blank, space, punctuation or word"""
    word_break: str
    """property Word_Break, values merged that have the same effect here"""
    case: str
    """Lu, Ll or nothing"""
    is_pictographic: bool


class Before(NamedTuple):
    """State: the text so far."""

    token: str = ""
    """kind of the last token; space: also several blanks"""
    base: str = ""
    """Word_Break of the last character that is no mark, if it can be continued"""
    last: str = ""
    """what is special about the last character"""


_MARKS = ("Extend", "ZWJ")
_LINES = ("CR", "LF")
_MERGED = {
    "ALetter": "letter", "Hebrew_Letter": "letter", "Numeric": "digit", "Format": "Extend",
    "Regional_Indicator": "flag", "Newline": "LF",
}  # fmt: skip
_CONTINUED = ("letter", "digit", "Katakana", "ExtendNumLet", "digit MidNum", "flag")
_JOINED = {  # pairs without a break between them (WB5 to WB16 of UAX #29)
    *((a, b) for a in ("letter", "digit") for b in ("letter", "digit")),
    *((a, "ExtendNumLet") for a in ("letter", "digit", "Katakana", "ExtendNumLet")),
    *(("ExtendNumLet", b) for b in ("letter", "digit", "Katakana")),
    ("Katakana", "Katakana"), ("flag", "flag"), ("digit", "MidNum"), ("digit MidNum", "digit"),
}  # fmt: skip


def _character(name: str) -> Character:
    category, _, properties = name.partition(".")
    word_break, *more = properties.split("+")
    word_break = _MERGED.get(word_break, word_break)
    # Punctuation always ends its token, and never begins a word: what it joins does not matter.
    is_inside = word_break in ("MidLetter", "MidNumLet", "Single_Quote", "Double_Quote")
    if is_inside or (word_break == "MidNum" and category == "P"):
        word_break = "Other"
    token = {"Space": "space", "P": "punctuation"}.get(category, "word")
    token = "blank" if "Blank" in more else token
    case = category if category in ("Lu", "Ll") else ""
    return Character(token, word_break, case, "Pictographic" in more)


def _continues_token(before: Before, new: Character) -> bool:
    """Whether a character continues the last token."""
    if not before.token or before.last == "punctuation":
        return False
    if before.last == "Ll" and new.case == "Lu":  # camelCase
        return False
    if before.last in _LINES or new.word_break in _LINES:
        return (before.last, new.word_break) == _LINES
    if new.word_break in _MARKS or (before.last == "ZWJ" and new.is_pictographic):
        return True
    if new.word_break == "WSegSpace":
        return before.last == "WSegSpace"
    return (before.base, new.word_break) in _JOINED


def step(before: Before, new: Character) -> tuple[Before, int]:
    """(state, whether a word starts at this character)."""
    is_joined = _continues_token(before, new)
    base = new.word_break
    if base in _MARKS and before.last not in ("", *_LINES):
        base = before.base
    elif is_joined and base == "MidNum":
        base = "digit MidNum"
    elif is_joined and base == "flag":  # a pair: the next one begins another
        base = ""
    base = base if base in _CONTINUED else ""
    last = new.word_break if new.word_break in ("ZWJ", "WSegSpace", *_LINES) else "other"
    last = "Ll" if new.case == "Ll" else last
    last = "punctuation" if new.token == "punctuation" else last
    if is_joined:
        token = "word"
        if new.token == "punctuation":
            token = new.token
        elif before.token in ("blank", "space") and new.token in ("blank", "space"):
            token = "space"
        return Before(token, base, last), 0
    appended = before.token == "blank" and new.token == "word"
    if new.token == "punctuation":
        appended = before.token in ("blank", "word", "punctuation")
    return Before(new.token, base, last), int(before.token != "" and not appended)


@cache
def hat_words() -> Automaton:
    """1 at each character that starts a word of hat-splitter."""
    return Automaton(Before(), step, _character)


class HatWords(CharacterRule):
    """The first character of each word of hat-splitter (arXiv 2501.10322).

    Words by UAX #29, cut after punctuation and in camelCase; one blank before a word, and
    punctuation after it, belong to it. Equal to Aleph-Alpha-Research/hat-splitter but for two
    cases in which that needs a second character: white space before a combining mark, and a
    fraction slash after a digit.
    """

    alignments = ("start",)

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """First character of each word by hat-splitter's rules (HAT)."""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.automaton = hat_words()
