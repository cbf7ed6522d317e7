"""Alarms for the ways in which learned boundaries fail, raised while the run can be stopped."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean

WINDOW = 50  # steps that "stuck" and "drift" look at
PERSISTENCE = 20  # steps that an extreme rate must last: the first updates reach both


class BoundaryAlarms:
    """Watches the boundary rate of each stage; `check` returns one line per new alarm.

    all-boundary: nearly every position starts a chunk. no-boundary: hardly any position does.
    stuck: the rate is far from the target and did not move over the window. drift: the rate moved
    away from the target over the window. Means over PERSISTENCE steps at both ends of the window
    are compared, so that one batch with another mix of texts is no drift. An alarm is repeated
    only after a step without it.
    """

    def __init__(self, is_held: tuple[bool, ...], hold_from: int):
        """is_held: whether the controller holds each stage's rate after `hold_from` updates."""
        self.is_held, self.hold_from = is_held, hold_from
        self.history = [deque(maxlen=WINDOW) for _ in is_held]
        self.active: set[tuple[int, str]] = set()

    def check(self, step: int, rates: tuple[float, ...], targets: tuple[float, ...]) -> list[str]:
        """rates, targets: boundary rate and target rate of each stage in this step."""
        found = set()
        for stage, both in enumerate(zip(rates, targets)):
            self.history[stage].append(both)
            found |= {(stage, name) for name in diagnose(*zip(*self.history[stage]))}
        new = sorted(found - self.active)
        self.active = found
        return [
            f"step {step}: alarm {name!r} at stage {stage}: boundary rate {rates[stage]:.3f}, "
            f"target {targets[stage]:.3f}; {self._remedy(step, stage, name)}"
            for stage, name in new
        ]

    def _remedy(self, step: int, stage: int, name: str) -> str:
        if self.is_held[stage] and step <= self.hold_from:
            return f"{_CAUSE[name]}: it is held from step {self.hold_from + 1} on"
        if self.is_held[stage]:
            return f"{_CAUSE[name]}: raise rate_control.hold_frac or rate_control.gain"
        return f"{_CAUSE[name]}: raise the weight of the stage's chunking.losses, or use hold_rate"


_CAUSE = {
    "all-boundary": "cross-entropy wants more chunks than the target",
    "no-boundary": "the rate overshot its target",
    "stuck": "the router gets no useful gradient",
    "drift": "the rate moves away from its target",
}


def diagnose(rates: Sequence[float], targets: Sequence[float]) -> set[str]:
    """Alarms of one stage. rates, targets: those of the last steps, oldest first."""
    full, recent = len(rates) == WINDOW, rates[-PERSISTENCE:]
    if len(recent) == PERSISTENCE and min(recent) > 0.95:
        return {"all-boundary"}
    if len(recent) == PERSISTENCE and max(recent) < 0.1 * targets[-1]:
        return {"no-boundary"}
    off = [rate / target - 1 for rate, target in zip(rates, targets)]
    before, now = abs(fmean(off[:PERSISTENCE])), abs(fmean(off[-PERSISTENCE:]))
    if full and now > 0.5 and max(rates) - min(rates) < 0.02 * targets[-1]:
        return {"stuck"}
    if full and now > 0.5 and now > 1.5 * before:
        return {"drift"}
    return set()
