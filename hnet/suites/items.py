"""Generated questions with one right answer, after solved examples of the same kind."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hnet.suites.scorer import Scorer, bits_per_byte

Row = dict[str, Any]
Report = dict[str, list[Row]]
"""tables by name; rows with equal keys; values: numbers, words, or None if undefined"""


@dataclass(frozen=True)
class Settings:
    """Settings common to all suites."""

    items: int = 200
    """number of questions per task, or of passages"""
    shots: int = 4
    """number of solved examples before each question"""
    seed: int = 0
    """seed of everything that is drawn"""
    max_bytes: int = 512
    """longest passage of a text"""
    texts: tuple[bytes, ...] = ()
    """passages of text, for suites that need some"""
    parallel: dict[str, list[bytes]] = field(default_factory=dict)
    """sentences by language, line i saying the same in all"""


@dataclass(frozen=True)
class Item:
    """One question and its answer, which ends with a newline."""

    prompt: bytes
    answer: bytes
    tags: Row = field(default_factory=dict)
    """values to group results by"""


Pair = tuple[str, str, Row]
"""question, answer, tags"""


def with_shots(
    make: Callable[[random.Random], Pair], settings: Settings, key: str, count: int | None = None
) -> list[Item]:
    """Items of one kind, each after solved examples that `make` draws for it.

    key: name that separates the random numbers of this kind from those of others. An example that
    equals the question is drawn again.
    """
    rng = random.Random(f"{settings.seed} {key}")
    items = []
    for _ in range(settings.items if count is None else count):
        question, answer, tags = make(rng)
        shots: list[str] = []
        for _ in range(100 * settings.shots):
            if len(shots) == settings.shots:
                break
            shot = make(rng)
            if shot[0] != question:
                shots.append(f"{shot[0]}{shot[1]}\n")
        items.append(Item("".join([*shots, question]).encode(), answer.encode(), tags))
    return items


@dataclass(frozen=True)
class Answer:
    """A model's result on one item."""

    item: Item
    is_right: bool
    """whether greedy decoding gives exactly the answer and a newline"""
    byte_accuracy: float
    """share of the answer's bytes, newline included, that are most likely after the right prefix"""
    bpb: float
    """bits per byte of the answer, newline included"""


def ask(scorer: Scorer, items: Sequence[Item]) -> list[Answer]:
    """The result on each item. Greedy decoding gives the answer if and only if each of its bytes is
    the most likely one after those before it, so a forward pass over prompt and answer suffices."""
    scores = scorer.score([item.prompt + item.answer + b"\n" for item in items])
    answers = []
    for item, score in zip(items, scores):
        start = len(item.prompt)
        own = type(score)(score.data[start:], score.logprobs[start:], score.is_greedy[start:])
        greedy = own.is_greedy
        answers.append(Answer(item, bool(greedy.all()), float(greedy.mean()), bits_per_byte([own])))
    return answers


def by_tags(answers: Sequence[Answer], *names: str) -> list[Row]:
    """One row per combination of these tags: the first tag in order of occurrence, others sorted.

    Items that lack one of the tags are left out. `majority` is the accuracy of always giving the
    most frequent answer of the group.
    """
    groups: dict[tuple, list[Answer]] = {}
    for answer in answers:
        tags = answer.item.tags
        if all(name in tags for name in names):
            groups.setdefault(tuple(tags[name] for name in names), []).append(answer)
    firsts = list(dict.fromkeys(key[:1] for key in groups))
    rows = []
    for key, members in sorted(groups.items(), key=lambda g: (firsts.index(g[0][:1]), g[0][1:])):
        frequent = Counter(a.item.answer for a in members).most_common(1)[0][1]
        rows.append(
            {
                **dict(zip(names, key)),
                "items": len(members),
                "accuracy": sum(a.is_right for a in members) / len(members),
                "byte_accuracy": sum(a.byte_accuracy for a in members) / len(members),
                "bpb": sum(a.bpb for a in members) / len(members),
                "majority": frequent / len(members),
            }
        )
    return rows
