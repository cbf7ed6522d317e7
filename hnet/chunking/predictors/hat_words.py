"""The words of hat-splitter, as starts: each is known at the first character of a word."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.bounds import Natural
from hnet.chunking.automaton import FIRST_SPECIAL, Automaton
from hnet.chunking.part import PredictorConfig
from hnet.chunking.predictors.words import CharacterRule
from hnet.code_points import completed
from hnet.nn.layers import segment_starts


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

        limit: Natural = 0
        """maximum number of bytes of a word: a longer one is cut at characters; 0 = no limit"""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.automaton, self.limit = hat_words(), config.limit

    def init(self, rows):
        state = super().init(rows)
        return (state, jnp.zeros((rows,), jnp.int32)) if self.limit else state

    def step(self, state, x):
        if not self.limit:
            return super().step(state, x)
        state, length_R = state
        byte_R = x.context.bytes_BL
        state, starts_R = self.automaton.step(state, byte_R)
        length_R, starts_R = cut_at(self.limit, length_R, byte_R, state.window_R, starts_R)
        return (state, length_R), self.prediction(starts_R)

    def __call__(self, rows):
        return self.prediction(self._cut(rows)[0]) if self.limit else super().__call__(rows)

    def after(self, rows):
        state = super().after(rows)
        return (state, rows.at_end(self._cut(rows)[1])) if self.limit else state

    def _cut(self, rows) -> tuple[jax.Array, jax.Array]:
        """(1 where a word starts, number of bytes of the last word so far), (B, L)."""
        bytes_BL, ids_BL = rows.context.bytes_BL, rows.context.segment_ids_BL
        starts_BL, states = self.automaton.run(bytes_BL, ids_BL)

        def one(length_B, x):
            new_text_B, *x = x
            length_B, starts_B = cut_at(self.limit, jnp.where(new_text_B, 0, length_B), *x)
            return length_B, (starts_B, length_B)

        by_time = segment_starts(ids_BL), bytes_BL, states.window_R, starts_BL
        zeros_B = jnp.zeros(ids_BL.shape[:1], jnp.int32)
        _, found = jax.lax.scan(one, zeros_B, tuple(a.T for a in by_time))
        return found[0].T, found[1].T


def cut_at(
    limit: int, length_R: jax.Array, byte_R: jax.Array, window_R: jax.Array, starts_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(number of bytes of the last word after this one, 1 where a word starts), int32.

    window_R: the last four bytes. starts_R: 1 where the rule without a limit has a start.
    """
    code_R = completed(window_R, jnp)
    width_R = 1 + sum((code_R >= least).astype(jnp.int32) for least in (0x80, 0x800, 0x10000))
    ends_R = (code_R != 0) | (byte_R == 0)  # ends of characters
    length_R = length_R + 1
    is_long_R = ends_R & (length_R > limit) & (length_R > width_R)
    starts_R = ((starts_R > 0) | is_long_R).astype(jnp.int32)
    length_R = jnp.where(starts_R > 0, width_R, length_R)
    return jnp.where(byte_R >= FIRST_SPECIAL, 0, length_R), starts_R
