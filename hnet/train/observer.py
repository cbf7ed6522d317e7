"""Callbacks of a run, for programs that watch or time it."""

from typing import Any

from hnet.train.evaluate import Evaluation


class Observer:
    """Functions that a run calls in every process; override those that you need.

    They run between two steps, so their time is time of the run. An exception ends the run.
    """

    def step(self, row: dict[str, Any]) -> bool:
        """After each step, before it is logged; row: as `RunLogger.step` gets it. Returns whether
        the step is checked and logged."""
        return True

    def logged(self, row: dict[str, Any], seconds: float) -> None:
        """After a step that `step` admitted; seconds: what checking and logging it took."""

    def evaluated(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """After an evaluation was logged; seconds: what that and drawing its texts took."""

    def said(self, text: str) -> None:
        """Before a permanent line is printed."""
