"""Evaluations from papers, each in a small file; they run on any checkpoint or `Scorer`.

    python -m experiments.evaluate --checkpoint WORKDIR --suite perturb counting

To add one: write a file with `run(scorer, settings) -> {table: rows}` and add a line to SUITES.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from hnet.suites import (
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
from hnet.suites.items import Report, Settings
from hnet.suites.scorer import Scorer


class Suite(NamedTuple):
    run: Callable[[Scorer, Settings], Report]
    reads: Literal["nothing", "texts", "parallel"] = "nothing"
    """input that the suite needs in addition to generated items"""


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
