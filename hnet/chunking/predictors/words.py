"""Rules of words with several levels (AU-Net), and the predictor of the stages that they serve."""

import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from hnet.bounds import Count
from hnet.chunking.automaton import Automaton
from hnet.chunking.boundaries import Prediction
from hnet.chunking.part import PredictorConfig
from hnet.chunking.predictors.rules import Rule


def _kind(name: str) -> str:
    """Letter, number, newline, space, or symbol (all other characters)."""
    category, _, word_break = name.partition(".")
    if category == "Space":
        return "newline" if word_break in ("CR", "LF") else "space"
    letters = {"Lu": "letter", "Ll": "letter", "L": "letter", "N": "number"}
    return letters.get(category, "symbol")


@cache
def words(every: tuple[int, ...]) -> Automaton:
    """Levels of AU-Net's strategies word<n> for n in `every` (arXiv 2506.14761).

    The expressions of facebookresearch/lingua (apps/aunet), of which the first three give every
    level at their first character, and the last one level i + 1 at its last character:

        \\p{N}{1,3}   [^\\s\\p{L}\\p{N}]{1,3}[\\r\\n]*   \\s*[\\r\\n]   (\\S+?\\s){every[i]}

    One difference: where \\s*[\\r\\n] begins before the newline, a newline changes the level of an
    earlier byte. Here it gives its level at the first newline, where it is known.
    """
    period = math.lcm(*every)

    def step(state, kind):
        last, length, num_words = state  # last expression, its length, and complete words in a row
        top = len(every)
        if kind in ("number", "symbol"):
            length = length % 3 + 1 if last == kind else 1
            return (kind, length, num_words), top if length == 1 else 0
        if kind == "letter":
            return (kind, 0, num_words), 0
        level = 0
        if last in ("number", "symbol", "letter"):
            num_words += 1
            level = max((i + 1 for i, n in enumerate(every) if num_words % n == 0), default=0)
            num_words %= period
        else:
            num_words = 0
        if kind == "newline" and last in ("symbol", "after symbol"):
            return ("after symbol", 0, num_words), level
        if last == "line":
            return ("line", 0, num_words), level
        if kind == "newline":
            return ("line", 0, num_words), top
        return ("space", 0, num_words), level

    return Automaton(("", 0, 0), step, _kind)


class CharacterRule(Rule):
    """Base of rules of characters: a finite automaton, whose output is the level of a byte."""

    reads_bytes = True
    most_at_first = 2.0
    automaton: Automaton

    def init(self, rows):
        return self.automaton.init(rows)

    def step(self, state, x):
        state, level_R = self.automaton.step(state, x.context.bytes_BL)
        return state, self.prediction(level_R)

    def __call__(self, rows):
        context = rows.context
        return self.prediction(self.automaton(context.bytes_BL, context.segment_ids_BL))

    def after(self, rows):
        return self.automaton.after(rows.context.bytes_BL, rows.context.segment_ids_BL)

    def prediction(self, level: jax.Array) -> Prediction:
        levels = level if self.gives_levels else None
        return Prediction(prob=(level > 0).astype(jnp.float32), levels=levels)


@cache
def white_space() -> Automaton:
    """1 at each character with the property White_Space."""
    return Automaton(
        0, lambda state, is_space: (0, int(is_space)), lambda name: name[:5] == "Space"
    )


class UnicodeWhitespace(CharacterRule):
    """Every character of white space (HAT, arXiv 2501.10322)."""

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Every character of white space, by Unicode (HAT)."""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.automaton = white_space()


class Words(CharacterRule):
    """Ends of groups of words, of numbers, of symbols and of lines, each group in its stage.

    It gives the levels of all stages: stage s has a boundary where the level is above s. Inner
    stages take predictor "levels".
    """

    alignments = ("end",)
    gives_levels = True

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Ends of groups of words, with levels for inner stages (AU-Net)."""

        every: tuple[Count, ...] = (1, 2)
        """number of words per chunk of each stage that chunks, from stage 0 inwards"""

        @property
        def num_levels(self) -> int:
            return len(self.every)

        def problem(self):
            if not self.every or math.lcm(*self.every) > 12:
                return (
                    f"every={self.every}: give each stage a number of words, with a least common "
                    "multiple of at most 12"
                )
            return None

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.automaton = words(config.every)


class Levels(Rule):
    """Boundaries of an inner stage where the level of a rule in stage 0 is above its index."""

    reads_levels = True
    most_at_first = 2.0

    @dataclass(frozen=True)
    class Config(PredictorConfig):
        """Boundaries of an inner stage by the levels of a rule in stage 0."""

    def __init__(self, config, place, *, rngs):
        super().__init__(config, place, rngs=rngs)
        self.stage_idx = place.stage_idx

    def step(self, state, x):
        return state, self(x)

    def __call__(self, rows):
        is_boundary = rows.context.levels_BL > self.stage_idx
        return Prediction(prob=is_boundary.astype(jnp.float32))
