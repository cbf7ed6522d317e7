"""Questions with one right answer, made by code, after solved examples of the same kind."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.suites.scorer import Scorer, bits_per_byte

Row = dict[str, Any]
Report = dict[str, list[Row]]
"""tables by name, rows of equal keys: numbers, words, or None for what is not defined"""


@dataclass(frozen=True)
class Settings:
    """What all suites can be told."""

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
    """One question and its answer, which a newline ends."""

    prompt: bytes
    answer: bytes
    tags: Row = field(default_factory=dict)
    """what to group by"""


Pair = tuple[str, str, Row]
"""question, answer, tags"""


def with_shots(
    make: Callable[[random.Random], Pair], settings: Settings, key: str, count: int | None = None
) -> list[Item]:
    """Items of one kind, each after solved examples that `make` draws anew.

    key: name that tells this kind's random numbers from those of others. An example that is the
    question itself is drawn again.
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
    """How a model took one item."""

    item: Item
    is_right: bool
    """whether greedy decoding gives exactly the answer and a newline"""
    byte_accuracy: float
    """share of the answer's bytes and its newline that are likeliest after the right ones"""
    bpb: float
    """bits per byte of the answer and its newline"""


def ask(scorer: Scorer, items: Sequence[Item]) -> list[Answer]:
    """Greedy decoding gives an answer exactly if each of its bytes is likeliest after the others,
    so one forward pass over prompt and answer decides."""
    scores = scorer.score([item.prompt + item.answer + b"\n" for item in items])
    answers = []
    for item, score in zip(items, scores):
        start = len(item.prompt)
        own = type(score)(score.data[start:], score.logprobs[start:], score.is_greedy[start:])
        greedy = own.is_greedy
        answers.append(Answer(item, bool(greedy.all()), float(greedy.mean()), bits_per_byte([own])))
    return answers


def by_tags(answers: Sequence[Answer], *names: str) -> list[Row]:
    """A row per combination of these tags: by the first as it first occurs, by the others sorted.

    Items without one of the tags are left out. `majority` is the accuracy of always giving the most
    frequent answer of the group.
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
