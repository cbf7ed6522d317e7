"""Byte-to-byte tasks of MrT5 (arXiv 2410.20771): which bytes may be deleted depends on the context.

`#` marks the input. vowel removal: all vowels are removed. contextual vowel removal: a vowel is
removed if a lower-case consonant precedes it. sequence merge: each ABC becomes D.
"""

import random
import re
import string

from hnet.suites.items import Item, Report, Settings, ask, by_tags, with_shots
from hnet.suites.scorer import Scorer

LENGTH = 64
VOWELS = "aeiouAEIOU"
CONSONANTS = "".join(c for c in string.ascii_letters if c not in VOWELS)


def vowel_removal(text: str) -> str:
    return re.sub(f"[{VOWELS}]", "", text)


def contextual_vowel_removal(text: str) -> str:
    return re.sub(f"(?<=[{''.join(filter(str.islower, CONSONANTS))}])[{VOWELS}]", "", text)


def sequence_merge(text: str) -> str:
    return text.replace("ABC", "D")


TASKS = {
    "vowel removal": vowel_removal,
    "contextual vowel removal": contextual_vowel_removal,
    "sequence merge": sequence_merge,
}


def make(rng: random.Random, task: str) -> tuple[str, str, dict]:
    """Random letters with the task's patterns inserted, as often as in the source for its 128
    letters: consonant and vowel N(25, 12.5) times, ABC N(5, 2.5) times."""
    pieces = [rng.choice(string.ascii_letters) for _ in range(LENGTH)]
    share = LENGTH / 128
    match task:
        case "contextual vowel removal":
            count = round(rng.gauss(25 * share, 12.5 * share))
            new = lambda: rng.choice(CONSONANTS) + rng.choice(VOWELS)
        case "sequence merge":
            count, new = round(rng.gauss(5 * share, 2.5 * share)), lambda: "ABC"
        case _:
            count, new = 0, str
    for _ in range(max(0, count)):
        pieces.insert(rng.randint(0, len(pieces)), new())
    text = "".join(pieces)[:LENGTH]
    return f"#{text}=", TASKS[task](text), {"task": task}


def make_items(settings: Settings) -> list[Item]:
    return [
        item
        for task in TASKS
        for item in with_shots(lambda rng, task=task: make(rng, task), settings, task)
    ]


def run(scorer: Scorer, settings: Settings) -> Report:
    return {"diagnostic": by_tags(ask(scorer, make_items(settings)), "task")}
