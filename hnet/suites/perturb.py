"""Perturbed text: bits per byte, next-byte accuracy, and the choice of a continuation.

Perturbations as in arXiv 2507.07955 (table 3), from arXiv 2412.09871, and swaps of neighbours. The
choice questions are made from the text itself, since the code comes with no question set: which of
four pieces follows the context, where three come from other passages. Only the context is
perturbed. robustness = 100 (accuracy - 1/4) / (accuracy on clean text - 1/4) (appendix D.1).
"""

import random
from collections.abc import Callable

import numpy as np

from hnet.decode.score import Score
from hnet.errors import ConfigError
from hnet.suites.items import Report, Settings
from hnet.suites.scorer import Scorer, bits_per_byte

Perturb = Callable[[str, random.Random], str]
CHOICES = 4
ENDING = 48  # bytes per piece


def clean(text: str, rng: random.Random) -> str:
    return text


def ant_speak(text: str, rng: random.Random) -> str:
    return " ".join(text.upper())


def drop(text: str, rng: random.Random) -> str:
    return "".join(c for c in text if rng.random() >= 0.1)


def random_case(text: str, rng: random.Random) -> str:
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def repeat(text: str, rng: random.Random) -> str:
    return "".join(c * (rng.randint(2, 4) if rng.random() < 0.2 else 1) for c in text)


def upper_case(text: str, rng: random.Random) -> str:
    return text.upper()


def swap(text: str, rng: random.Random) -> str:
    """Swap each character with the next one with probability 0.1; none moves twice."""
    chars, i = list(text), 0
    while i + 1 < len(chars):
        if rng.random() < 0.1:
            chars[i], chars[i + 1] = chars[i + 1], chars[i]
            i += 1
        i += 1
    return "".join(chars)


PERTURBATIONS: dict[str, Perturb] = {
    "clean": clean, "ant_speak": ant_speak, "drop": drop, "random_case": random_case,
    "repeat": repeat, "upper_case": upper_case, "swap": swap,
}  # fmt: skip


def perturbed(text: bytes, perturb: Perturb, seed: object) -> bytes:
    """The perturbed text; bytes that are not UTF-8 become U+FFFD."""
    return perturb(text.decode("utf-8", "replace"), random.Random(f"{seed}")).encode()


def run(scorer: Scorer, settings: Settings) -> Report:
    questions = make_questions(settings)
    rows, clean_scores = [], {}
    for name, perturb in PERTURBATIONS.items():
        seeds = [f"{settings.seed} {name} {i}" for i in range(len(settings.texts))]
        texts = [perturbed(t, perturb, s) for t, s in zip(settings.texts, seeds)]
        scores = scorer.score(texts)
        found = {
            "byte_accuracy": byte_accuracy(scores),
            "choice_accuracy": choice_accuracy(scorer, questions, perturb, settings.seed),
        }
        clean_scores = clean_scores or found
        rows.append(
            {
                "perturbation": name,
                "bpb": bits_per_byte(scores),
                **found,
                "robustness": robustness(
                    found["choice_accuracy"], clean_scores["choice_accuracy"], 1 / CHOICES
                ),
                "byte_robustness": robustness(
                    found["byte_accuracy"], clean_scores["byte_accuracy"], 1 / 256
                ),
            }
        )
    return {"perturb": rows}


def byte_accuracy(scores: list[Score]) -> float:
    """Share of bytes that are the most likely ones at their position."""
    scored = sum(int(np.isfinite(s.logprobs).sum()) for s in scores)
    return sum(int(s.is_greedy.sum()) for s in scores) / max(scored, 1)


def robustness(accuracy: float, clean: float, chance: float) -> float | None:
    """Remaining percentage of the accuracy above chance; None if clean accuracy is at chance."""
    return 100 * (accuracy - chance) / (clean - chance) if clean > chance else None


def make_questions(settings: Settings) -> list[tuple[bytes, list[bytes]]]:
    """(context, pieces) per passage that is long enough; the first piece is the right one."""
    halves = [(t[:-ENDING], t[-ENDING:]) for t in settings.texts if len(t) >= 2 * ENDING]
    endings = sorted({ending for _, ending in halves})
    if len(endings) < CHOICES:
        raise ConfigError(
            f"suite perturb: {len(endings)} passages of {2 * ENDING} bytes: give more text"
        )
    rng = random.Random(f"{settings.seed} choice")
    questions = []
    for context, ending in halves:
        others = [e for e in rng.sample(endings, CHOICES) if e != ending]
        questions.append((context, [ending, *others[: CHOICES - 1]]))
    return questions


def choice_accuracy(
    scorer: Scorer, questions: list[tuple[bytes, list[bytes]]], perturb: Perturb, seed: int
) -> float:
    """Share of questions whose right piece is most likely; an n-way tie counts 1/n."""
    texts, starts = [], []
    for i, (context, pieces) in enumerate(questions):
        before = perturbed(context, perturb, f"{seed} {i}")
        texts += [before + piece for piece in pieces]
        starts += [len(before)] * len(pieces)
    totals = [score.total(start) for score, start in zip(scorer.score(texts), starts)]
    right = 0.0
    for first in range(0, len(totals), CHOICES):
        own = totals[first : first + CHOICES]
        right += (own[0] == max(own)) / own.count(max(own))
    return right / len(questions)
