"""Counting a letter in a string of random letters (arXiv 2410.19730).

The letters are adjacent, or separated by spaces, commas or quotes, so that each can become a chunk
of its own.
"""

import random

from hnet.suites.items import Item, Report, Settings, ask, by_tags, with_shots
from hnet.suites.scorer import Scorer

JOINED = {
    "raw": "".join,
    "space": " ".join,
    "comma": ", ".join,
    "quote": lambda letters: " ".join(f'"{c}"' for c in letters),
}
SHORTEST, LONGEST = 10, 40
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def make(rng: random.Random, form: str) -> tuple[str, str, dict]:
    letter, length = rng.choice(ALPHABET), rng.randint(SHORTEST, LONGEST)
    kinds = [letter, *rng.sample(ALPHABET.replace(letter, ""), 3)]  # so that the answer is not 0
    letters = [rng.choice(kinds) for _ in range(length)]
    tens = length // 10 * 10
    tags = {"format": form, "length": f"{tens}-{min(tens + 9, LONGEST)}"}
    return f"{letter} in {JOINED[form](letters)} = ", str(letters.count(letter)), tags


def make_items(settings: Settings) -> list[Item]:
    return [
        item
        for form in JOINED
        for item in with_shots(lambda rng, form=form: make(rng, form), settings, f"counting {form}")
    ]


def run(scorer: Scorer, settings: Settings) -> Report:
    answers = ask(scorer, make_items(settings))
    return {
        "counting": by_tags(answers, "format"),
        "counting by length": by_tags(answers, "format", "length"),
    }
