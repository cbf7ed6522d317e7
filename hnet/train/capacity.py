"""Chunk slots that follow the boundaries: a few capacities a stage, chosen from measured counts."""

from dataclasses import dataclass, replace

RUNGS = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the row's length
MARGIN = 1.2  # slots over the most that a row wanted
PATIENCE = 50  # steps that a smaller rung must have sufficed before it is taken


@dataclass(frozen=True)
class Ladder:
    """Current capacity of every stage that cuts, and the counts that will move it.

    A pure value: what it does next depends on the counts it was given, so a resumed run takes the
    same steps. Up happens as soon as the margin is gone, down only with patience.
    """

    seq_len: int
    capacities: tuple[int, ...]
    recent: tuple[tuple[int, ...], ...] = ()
    """most slots a row wanted, by stage, in the last PATIENCE steps since the last move"""

    @classmethod
    def start(cls, seq_len: int, counts: tuple[int, ...] | None, num_stages: int) -> "Ladder":
        """From counts measured before the first step; without them, nothing may be clipped."""
        slots = counts or (seq_len,) * num_stages
        return cls(seq_len, tuple(rung(seq_len, MARGIN * n) for n in slots))

    def observe(self, max_slots: tuple[int, ...]) -> "Ladder":
        """The ladder after a step whose fullest rows wanted `max_slots` of each stage."""
        if not max_slots:
            return self
        recent = (*self.recent, max_slots)[-PATIENCE:]
        most = tuple(max(counts) for counts in zip(*recent))
        wanted = tuple(rung(self.seq_len, MARGIN * m) for m in most)
        full = any(MARGIN**0.5 * n > c for n, c in zip(max_slots, self.capacities))
        shrinks = len(recent) == PATIENCE and any(w < c for w, c in zip(wanted, self.capacities))
        if not full and not shrinks:
            return replace(self, recent=recent)
        if not shrinks:
            wanted = tuple(max(w, c) for w, c in zip(wanted, self.capacities))
        if wanted == self.capacities:
            return replace(self, recent=recent)
        return Ladder(self.seq_len, wanted)

    def to_json(self) -> dict:
        return {"capacities": self.capacities, "recent": self.recent}

    @classmethod
    def from_json(cls, seq_len: int, content: dict) -> "Ladder":
        recent = tuple(tuple(counts) for counts in content["recent"])
        return cls(seq_len, tuple(content["capacities"]), recent)


def rung(seq_len: int, slots: float) -> int:
    """The smallest capacity of the ladder that holds `slots`, a multiple of 8 up to the length."""
    sizes = [min(seq_len, -(-round(f * seq_len) // 8) * 8) for f in RUNGS]
    return next((size for size in sizes if size >= slots), seq_len)
