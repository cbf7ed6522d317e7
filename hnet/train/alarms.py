"""Names for the ways in which learned boundaries go wrong, while there is time to stop."""

from collections import deque

WINDOW = 50  # steps that "stuck" and "drift" look back on
PERSISTENCE = 20  # steps that an extreme rate must last: the first updates swing through both


class BoundaryAlarms:
    """Watches the boundary rate of each stage; `check` returns new alarms as one line each.

    all-boundary: nearly every position starts a chunk. no-boundary: hardly any does.
    stuck: the rate has not moved though it is far from the target. drift: the rate ran away from
    the target over the window. An alarm is repeated only after it has been absent.
    """

    def __init__(self, target_rates: tuple[float, ...]):
        self.target_rates = target_rates
        self.history = [deque(maxlen=WINDOW) for _ in target_rates]
        self.active: set[tuple[int, str]] = set()

    def check(self, step: int, rates: tuple[float, ...]) -> list[str]:
        found = set()
        for stage, (rate, target) in enumerate(zip(rates, self.target_rates)):
            self.history[stage].append(rate)
            found |= {(stage, name) for name in diagnose(list(self.history[stage]), target)}
        new = sorted(found - self.active)
        self.active = found
        return [
            f"step {step}: alarm {name!r} at stage {stage}: boundary rate {rates[stage]:.3f}, "
            f"target {self.target_rates[stage]:.3f}; {_REMEDY[name]}"
            for stage, name in new
        ]


_REMEDY = {
    "all-boundary": "raise the stage's chunking.aux_loss_weight or lower the stage's learning rate",
    "no-boundary": "raise the stage's chunking.aux_loss_weight or lower the stage's learning rate",
    "stuck": "the router gets no useful gradient: raise the stage's chunking.aux_loss_weight",
    "drift": "the rate moves away from its target: raise the stage's chunking.aux_loss_weight, or "
    "controller.gain if it has hold_rate",
}


def diagnose(rates: list[float], target: float) -> set[str]:
    """Alarms of one stage from its last boundary rates, oldest first."""
    rate, full = rates[-1], len(rates) == WINDOW
    recent = rates[-PERSISTENCE:]
    if len(recent) == PERSISTENCE and min(recent) > 0.95:
        return {"all-boundary"}
    if len(recent) == PERSISTENCE and max(recent) < 0.1 * target:
        return {"no-boundary"}
    far = abs(rate - target) > 0.5 * target
    if full and far and max(rates) - min(rates) < 0.02 * target:
        return {"stuck"}
    if full and far and abs(rates[-1] - target) > 1.5 * abs(rates[0] - target):
        return {"drift"}
    return set()
