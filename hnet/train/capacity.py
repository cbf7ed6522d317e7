"""Chunk slots that follow the boundaries: a few capacities a stage, chosen from measured counts."""

from dataclasses import dataclass, replace

from hnet.config import HNetConfig

RUNGS = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of all slots
MARGIN = 1.2  # slots over the most that a row wanted
PATIENCE = 30  # steps that a smaller rung must have sufficed before it is taken


@dataclass(frozen=True)
class Ladder:
    """Current capacity of every stage that cuts, and the counts that will move it.

    A pure value: what it does next depends on the counts it was given, so a resumed run takes the
    same steps. It starts with all slots, because the first updates swing through every rate. Up
    happens as soon as the margin is gone, down only with patience.
    """

    full: tuple[int, ...]
    """slots that hold every set of boundaries, by stage"""
    capacities: tuple[int, ...]
    recent: tuple[tuple[int, ...], ...] = ()
    """most slots a row wanted, by stage, in the last PATIENCE steps since the last move"""

    @classmethod
    def start(cls, model: HNetConfig, seq_len: int) -> "Ladder":
        full, length = [], seq_len
        for stage in model.stages[:-1]:
            length = stage.chunking.max_slots(length)
            full.append(length)
        return cls(tuple(full), tuple(full))

    def observe(self, max_slots: tuple[int, ...]) -> "Ladder":
        """The ladder after a step whose fullest rows wanted `max_slots` of each stage."""
        if not max_slots:
            return self
        recent = (*self.recent, max_slots)[-PATIENCE:]
        most = tuple(max(counts) for counts in zip(*recent))
        wanted = tuple(rung(n, MARGIN * m) for n, m in zip(self.full, most))
        is_tight = any(
            MARGIN**0.5 * m > c and c < n for m, c, n in zip(max_slots, self.capacities, self.full)
        )
        shrinks = len(recent) == PATIENCE and any(w < c for w, c in zip(wanted, self.capacities))
        if is_tight and not shrinks:
            wanted = tuple(max(w, c) for w, c in zip(wanted, self.capacities))
        if not (is_tight or shrinks) or wanted == self.capacities:
            return replace(self, recent=recent)
        return Ladder(self.full, wanted)

    def to_json(self) -> dict:
        return {"capacities": self.capacities, "recent": self.recent}

    def with_json(self, content: dict) -> "Ladder":
        """This ladder where `to_json` left another."""
        recent = tuple(tuple(counts) for counts in content["recent"])
        return Ladder(self.full, tuple(content["capacities"]), recent)


def rung(full: int, slots: float) -> int:
    """The smallest capacity of the ladder that holds `slots`, a multiple of 8 up to `full`."""
    sizes = [min(full, -(-round(f * full) // 8) * 8) for f in RUNGS]
    return next((size for size in sizes if size >= slots), full)
