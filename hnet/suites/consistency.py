"""Right against wrong solutions of the same problem (arXiv 2603.11749): which is more likely?

Wrong numbers are random, coherent (always the same wrong rule) or contradictory (one of ten wrong
rules, drawn per problem). Solutions with one wrong rule compress as well as right ones.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hnet.suites.items import Report, Row, Settings
from hnet.suites.scorer import Scorer

Mistake = Callable[[int], int]
RULES: tuple[Mistake, ...] = (
    lambda x: x + 1, lambda x: x - 1, lambda x: x + 2, lambda x: x - 2, lambda x: x + 10,
    lambda x: x - 10, lambda x: x + 11, lambda x: x - 3, lambda x: x + 5, lambda x: x + 100,
)  # fmt: skip
ERRORS = ("random", "coherent", "contradictory")


def chain(rng: random.Random) -> tuple[str, Callable[[Mistake], str]]:
    """12 + 7 - 5: step by step, each from the result written in the previous step."""
    terms = [rng.randint(20, 60), *(rng.choice((-1, 1)) * rng.randint(2, 19) for _ in range(3))]
    signed = lambda term: f" {'-' if term < 0 else '+'} {abs(term)}"

    def solve(mistake: Mistake) -> str:
        value, steps = terms[0], []
        for term in terms[1:]:
            result = mistake(value + term)
            steps.append(f"{value}{signed(term)} = {result}")
            value = result
        return "; ".join(steps)

    return f"{terms[0]}{''.join(map(signed, terms[1:]))}: ", solve


def equation(rng: random.Random) -> tuple[str, Callable[[Mistake], str]]:
    """3 x + 7 = 25."""
    a, x, b = rng.randint(2, 9), rng.randint(11, 40), rng.randint(11, 60)

    def solve(mistake: Mistake) -> str:
        product = mistake(a * x)
        return f"{a} x = {product}; x = {mistake(product // a)}"

    return f"{a} x + {b} = {a * x + b}: ", solve


def derivative(rng: random.Random) -> tuple[str, Callable[[Mistake], str]]:
    """d/dx 3 x^4 + 5 x^2."""
    terms = [(rng.randint(2, 9), power) for power in sorted(rng.sample(range(2, 10), 2))[::-1]]

    def solve(mistake: Mistake) -> str:
        return " + ".join(f"{mistake(a * power)} x^{power - 1}" for a, power in terms)

    return f"d/dx {' + '.join(f'{a} x^{power}' for a, power in terms)}: ", solve


PROBLEMS = {"chain": chain, "equation": equation, "derivative": derivative}


@dataclass(frozen=True)
class Pair:
    """A problem with a right and a wrong solution."""

    prompt: bytes
    right: bytes
    wrong: bytes
    tags: Row


def mistake(error: str, rng: random.Random) -> Mistake:
    """A function from a right number to a wrong one."""

    def at_random(x: int) -> int:
        """Another number with as many digits."""
        size = len(str(abs(x)))
        low, high = (0 if size == 1 else 10 ** (size - 1)), 10**size
        while (found := rng.randrange(low, high)) == x:
            pass
        return found

    match error:
        case "random":
            return at_random
        case "coherent":
            return RULES[0]
        case "contradictory":
            return rng.choice(RULES)
        case _:
            raise ValueError(f"error={error!r}: use one of {ERRORS}")


def make_pairs(settings: Settings) -> list[Pair]:
    pairs = []
    for name, problem in PROBLEMS.items():
        for error in ERRORS:
            rng = random.Random(f"{settings.seed} consistency {name} {error}")
            for _ in range(settings.items):
                shots = ""
                for _ in range(settings.shots):
                    question, solve = problem(rng)
                    shots += f"{question}{solve(lambda x: x)}\n"
                question, solve = problem(rng)
                right, wrong = solve(lambda x: x), solve(mistake(error, rng))
                solutions = (f"{text}\n".encode() for text in (right, wrong))
                tags = {"problem": name, "error": error}
                pairs.append(Pair((shots + question).encode(), *solutions, tags))
    return pairs


def run(scorer: Scorer, settings: Settings) -> Report:
    pairs = make_pairs(settings)
    texts = [pair.prompt + solution for pair in pairs for solution in (pair.right, pair.wrong)]
    nlls = [-s.logprobs for s in scorer.score(texts)]
    rows: dict[tuple, list[dict[str, float]]] = {}
    for pair, right, wrong in zip(pairs, nlls[::2], nlls[1::2]):
        start = len(pair.prompt)
        differs = next(i for i, (a, b) in enumerate(zip(pair.right, pair.wrong)) if a != b)
        a, b = (nll[start:].astype(np.float64) for nll in (right, wrong))
        found = {
            "by_mean": preferred(a.mean(), b.mean()),
            "by_sum": preferred(a.sum(), b.sum()),
            "by_first_difference": preferred(a[differs], b[differs]),
            "nll_right": float(a.mean()),
            "nll_wrong": float(b.mean()),
        }
        rows.setdefault(tuple(pair.tags.values()), []).append(found)
    return {"consistency": [_mean_row(key, members) for key, members in rows.items()]}


def preferred(right: float, wrong: float) -> float:
    """1 if the right solution is more likely, 1/2 if both are equally likely, else 0."""
    return 0.5 if math.isclose(right, wrong, rel_tol=1e-9) else float(right < wrong)


def _mean_row(key: tuple, members: Sequence[dict[str, float]]) -> Row:
    means = {name: sum(m[name] for m in members) / len(members) for name in members[0]}
    return {"problem": key[0], "error": key[1], "pairs": len(members), **means}
