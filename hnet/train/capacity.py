"""Chunk slots that follow the boundaries: few capacities a stage, chosen from measured counts."""

import math
import statistics
from dataclasses import dataclass, replace

from hnet.config import HNetConfig

PATIENCE = 30  # steps whose counts are known before there are fewer slots, and between two such
DEVIATIONS = 4.0  # of the counts, that slots are held for above their mean
GUARD = 1.02  # slots over that, or over the highest count if it is higher
WORTH = 0.92  # fewer slots are taken from this share of the present ones on
WORTH_UNSETTLED = 0.6  # the same while counts still move a lot: each capacity is a compilation
SETTLED = 0.08  # deviation of the counts over their mean


@dataclass(frozen=True)
class Ladder:
    """Current capacity of every stage that cuts, and the counts that will move it.

    A pure value: what it does next depends on the counts it was given, so a resumed run takes the
    same steps. It starts with all slots, because the first updates swing through every rate. Up
    happens as soon as the guard is gone, down only with patience.
    """

    full: tuple[int, ...]
    """slots that hold every set of boundaries, by stage"""
    capacities: tuple[int, ...]
    packed_rows: int = 1
    """rows of the batch that share a row of slots"""
    stride: int = 1
    """distance in the batch between neighbours of those rows: the number of micro-batches"""
    recent: tuple[tuple[int, ...], ...] = ()
    """most that was wanted of a row of slots, by stage, in the last PATIENCE steps"""
    since: int = 0
    """steps since there were last fewer slots"""

    @classmethod
    def start(
        cls, model: HNetConfig, seq_len: int, packed_rows: int = 1, stride: int = 1
    ) -> "Ladder":
        full, length = [], packed_rows * seq_len
        for stage in model.stages[:-1]:
            full.append(stage.chunking.max_slots(length))
            length = full[-1] * stage.chunking.slots_per_chunk
        return cls(tuple(full), tuple(full), packed_rows, stride if packed_rows > 1 else 1)

    def observe(self, max_slots: tuple[int, ...]) -> "Ladder":
        """The ladder after a step whose fullest rows of slots wanted `max_slots` of each stage."""
        if not max_slots:
            return self
        recent = (*self.recent, max_slots)[-PATIENCE:]
        by_stage = list(zip(*recent))
        wanted = tuple(rung(n, needed(counts)) for n, counts in zip(self.full, by_stage))
        tight = [GUARD * m > c for m, c in zip(max_slots, self.capacities)]
        fewer = [
            w <= c * (WORTH if is_settled(counts) else WORTH_UNSETTLED)
            for w, c, counts in zip(wanted, self.capacities, by_stage)
        ]
        since = self.since + 1
        shrinks = any(fewer) and len(recent) == PATIENCE and since >= PATIENCE
        capacities = tuple(
            max(w, c) if is_tight else (w if shrinks and is_fewer else c)
            for w, c, is_tight, is_fewer in zip(wanted, self.capacities, tight, fewer)
        )
        return replace(self, capacities=capacities, recent=recent, since=0 if shrinks else since)

    def to_json(self) -> dict:
        return {
            "capacities": self.capacities, "recent": self.recent, "since": self.since,
            "packed_rows": self.packed_rows, "stride": self.stride,
        }  # fmt: skip

    def with_json(self, content: dict) -> "Ladder":
        """This ladder where `to_json` left another.

        Where other rows share slots than did there, as on another number of devices, its counts
        say nothing, and there are as many slots as the rows can have wanted together.
        """
        if (crossed := self._rows_crossed(content)) is None:
            return self
        capacities = tuple(min(f, crossed * c) for f, c in zip(self.full, content["capacities"]))
        if not self.has_unit_of(content):
            return replace(self, capacities=capacities)
        recent = tuple(tuple(counts) for counts in content["recent"])
        return replace(self, capacities=capacities, recent=recent, since=content["since"])

    def has_unit_of(self, content: dict) -> bool:
        """Whether the numbers in a `to_json` are of the same rows as those of this ladder."""
        rows = content.get("packed_rows", self.packed_rows if self.packed_rows == 1 else None)
        return (rows, content.get("stride", 1)) == (self.packed_rows, self.stride)

    def _rows_crossed(self, content: dict) -> int | None:
        """Most rows of slots there from which the rows that share one here can come.

        None if that is not known, since earlier versions left out how many rows share one.
        """
        if self.has_unit_of(content) or self.packed_rows == 1:
            return 1
        if (before := content.get("packed_rows")) is None:
            return None
        if before > 1 and content["stride"] != self.stride:
            return self.packed_rows
        if before == 1 or self.packed_rows % before == 0:
            return self.packed_rows // before
        return 1 if before % self.packed_rows == 0 else -(-self.packed_rows // before) + 1


def needed(counts: tuple[int, ...]) -> float:
    """Slots that the next steps are given, after these counts."""
    high = statistics.fmean(counts) + DEVIATIONS * statistics.pstdev(counts)
    return GUARD * max(high, *counts)


def is_settled(counts: tuple[int, ...]) -> bool:
    """Whether the counts have stopped to move much."""
    return statistics.pstdev(counts) <= SETTLED * statistics.fmean(counts)


def rung(full: int, slots: float) -> int:
    """The smallest capacity that holds `slots`: 32 an octave, multiples of 8, at most `full`."""
    step = max(8, 1 << max(math.ceil(slots).bit_length() - 6, 0))
    return min(full, -(-math.ceil(slots) // step) * step)
