"""Evaluations that papers quote, each a small file; any checkpoint, any `Scorer`.

    python -m experiments.evaluate --checkpoint WORKDIR --suite perturb counting

To add one: a file with `run(scorer, settings) -> {table: rows}` and a line in SUITES.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from experiments.suites import (
    arithmetic,
    chars,
    consistency,
    counting,
    diagnostic,
    fairness,
    markov,
    perturb,
    stability,
    surprise,
)
from experiments.suites.items import Report, Settings
from experiments.suites.scorer import Scorer


class Suite(NamedTuple):
    run: Callable[[Scorer, Settings], Report]
    reads: Literal["nothing", "texts", "parallel"] = "nothing"
    """what it needs beside what code makes"""


SUITES: dict[str, Suite] = {
    "perturb": Suite(perturb.run, "texts"),
    "chars": Suite(chars.run, "texts"),
    "markov": Suite(markov.run),
    "arithmetic": Suite(arithmetic.run),
    "consistency": Suite(consistency.run),
    "counting": Suite(counting.run),
    "diagnostic": Suite(diagnostic.run),
    "stability": Suite(stability.run, "texts"),
    "surprise": Suite(surprise.run, "texts"),
    "fairness": Suite(fairness.run, "parallel"),
}
