"""Questions about the characters of words: counting and finding as in CharBench, spelling and
editing as in CUTE (arXiv 2409.15452).

Words of 4 to 10 letters come from the evaluated text, with equal numbers of each length.
"""

import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Sequence

from hnet.errors import ConfigError
from hnet.suites.items import Item, Report, Row, Settings, ask, by_tags, with_shots
from hnet.suites.scorer import Scorer

LENGTHS = range(4, 11)
Task = Callable[[str, random.Random], tuple[str, str, dict]]


def count(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char = rng.choice(word)
    return f"How many {char} are in {word}?", str(word.count(char)), {}


def count_different(word: str, rng: random.Random) -> tuple[str, str, dict]:
    return f"How many different letters are in {word}?", str(len(set(word))), {}


def first_index(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char = rng.choice(word)
    at = word.index(char)
    return f"Index of the first {char} in {word}?", str(at), {"at": at}


def last_index(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char = rng.choice(word)
    at = word.rindex(char)
    return f"Index of the last {char} in {word}?", str(at), {"at": at}


def spell(word: str, rng: random.Random) -> tuple[str, str, dict]:
    return f"Spell {word}.", " ".join(word), {}


def join(word: str, rng: random.Random) -> tuple[str, str, dict]:
    return f"Join {' '.join(word)}.", word, {}


def contains(word: str, rng: random.Random) -> tuple[str, str, dict]:
    others = [c for c in string.ascii_lowercase if c not in word]
    char = rng.choice(rng.choice((word, others)))
    return f"Is there a {char} in {word}?", "yes" if char in word else "no", {}


def insert(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char, new = rng.choice(word), rng.choice(string.ascii_lowercase)
    return f"Add {new} after each {char} in {word}.", word.replace(char, char + new), {}


def delete(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char = rng.choice(word)
    return f"Delete each {char} in {word}.", word.replace(char, ""), {}


def substitute(word: str, rng: random.Random) -> tuple[str, str, dict]:
    char, new = rng.choice(word), rng.choice(string.ascii_lowercase)
    return f"Replace each {char} by {new} in {word}.", word.replace(char, new), {}


def exchange(word: str, rng: random.Random) -> tuple[str, str, dict]:
    a, b = rng.sample(word, 2)
    return f"Swap {a} and {b} in {word}.", word.translate(str.maketrans(a + b, b + a)), {}


TASKS: dict[str, Task] = {
    "count": count, "count different": count_different, "first index": first_index,
    "last index": last_index, "spell": spell, "join": join, "contains": contains,
    "insert": insert, "delete": delete, "substitute": substitute, "swap": exchange,
}  # fmt: skip


def words_by_length(texts: Sequence[bytes]) -> dict[int, list[str]]:
    """Distinct lower-case words of ASCII letters in the text, by length."""
    found: dict[int, set[str]] = defaultdict(set)
    for text in texts:
        for word in re.findall(r"(?<!\w)[A-Za-z]+(?!\w)", text.decode("utf-8", "replace")):
            if len(word) in LENGTHS:
                found[len(word)].add(word.lower())
    return {length: sorted(found[length]) for length in sorted(found)}


def make_items(settings: Settings) -> list[Item]:
    words = words_by_length(settings.texts)
    if sum(map(len, words.values())) < 2:
        raise ConfigError("suite chars: the text has no words of 4 to 10 letters: give other files")

    def make(rng: random.Random, name: str) -> tuple[str, str, Row]:
        length = rng.choice(sorted(words))
        word = rng.choice(words[length])
        question, answer, extra = TASKS[name](word, rng)
        tags = {"task": name, "length": length, **extra}
        if extra:
            tags["place"] = question.rindex(word) + tags.pop("at") - len(question) - 1
        return f"{question} ", answer, tags

    return [
        item
        for name in TASKS
        for item in with_shots(lambda rng, name=name: make(rng, name), settings, f"chars {name}")
    ]


def run(scorer: Scorer, settings: Settings) -> Report:
    items = make_items(settings)
    if scorer.alignments:
        tag_chunks(scorer, items)
    answers = ask(scorer, items)
    return {
        "chars": by_tags(answers, "task"),
        "chars by length": by_tags(answers, "task", "length"),
        "chars by chunk": by_tags(answers, "task", "chunk_bytes"),
    }


def tag_chunks(scorer: Scorer, items: Sequence[Item]) -> None:
    """Tag index questions with the size of the stage 0 chunk that contains the requested letter."""
    asked = [item for item in items if "place" in item.tags]
    for item, seg in zip(asked, scorer.boundaries([item.prompt for item in asked])):
        at = len(item.prompt) + item.tags["place"]
        edges = [*seg.stages[0].starts, len(seg.data)]
        item.tags["chunk_bytes"] = next(b - a for a, b in zip(edges, edges[1:]) if a <= at < b)
