"""Chunk slots per row, adapted to measured counts with few distinct capacities per stage."""

import statistics
from dataclasses import dataclass, replace

from hnet.chunking.slots import bucket
from hnet.config import HNetConfig

SHRINK_AFTER = 30  # steps of counts needed before the slots shrink, and between two shrinks
DEVIATIONS = 4.0  # standard deviations of the counts kept free above their mean
GUARD = 1.02  # safety factor on max(mean + 4 std, largest recent count)
WORTH = 0.92  # shrink only if the new capacity is at most 92 % of the current one
WORTH_UNSETTLED = 0.6  # the same while counts vary a lot: each new capacity costs a compilation
SETTLED = 0.08  # largest std / mean of counts that vary little


@dataclass(frozen=True)
class CapacitySchedule:
    """Current capacity of every stage that chunks, and the recent counts that determine the next.

    A pure value: the next capacities depend only on the observed counts, so a resumed run repeats
    them. A run starts with all slots, because the first updates pass through every rate, or with
    fewer if a rule makes them (`ChunkingConfig.first_slots`). A capacity grows as soon as the
    safety factor is used up and shrinks at most once per SHRINK_AFTER steps.
    """

    full: tuple[int, ...]
    """slots per row of each stage that hold any set of boundaries"""
    capacities: tuple[int, ...]
    rows_sharing_slots: int = 1
    """rows of the batch that share a row of slots"""
    stride: int = 1
    """distance in the batch between neighbours that share slots: the number of micro-batches"""
    recent: tuple[tuple[int, ...], ...] = ()
    """largest number of slots that a row of slots needed, per step (last SHRINK_AFTER) and stage"""
    since: int = 0
    """steps since the slots last shrank"""

    @classmethod
    def start(
        cls, model: HNetConfig, seq_len: int, rows_sharing_slots: int = 1, stride: int = 1
    ) -> "CapacitySchedule":
        full, first = [], []
        length = used = rows_sharing_slots * seq_len
        for stage in model.stages[:-1]:
            cut = stage.chunking
            full.append(cut.max_slots(length))
            first.append(bucket(full[-1], cut.first_slots(used)))
            length, used = (n[-1] * cut.slots_per_chunk for n in (full, first))
        stride = stride if rows_sharing_slots > 1 else 1
        return cls(tuple(full), tuple(first), rows_sharing_slots, stride)

    def observe(self, max_slots: tuple[int, ...]) -> "CapacitySchedule":
        """The schedule after a step whose fullest row of slots needed `max_slots` of each stage."""
        if not max_slots:
            return self
        recent = (*self.recent, max_slots)[-SHRINK_AFTER:]
        by_stage = list(zip(*recent))
        wanted = tuple(bucket(n, needed(counts)) for n, counts in zip(self.full, by_stage))
        tight = [GUARD * m > c for m, c in zip(max_slots, self.capacities)]
        fewer = [
            w <= c * (WORTH if is_steady(counts) else WORTH_UNSETTLED)
            for w, c, counts in zip(wanted, self.capacities, by_stage)
        ]
        since = self.since + 1
        shrinks = any(fewer) and len(recent) == SHRINK_AFTER and since >= SHRINK_AFTER
        capacities = tuple(
            max(w, c) if is_tight else (w if shrinks and is_fewer else c)
            for w, c, is_tight, is_fewer in zip(wanted, self.capacities, tight, fewer)
        )
        return replace(self, capacities=capacities, recent=recent, since=0 if shrinks else since)

    def to_json(self) -> dict:
        return {
            "capacities": self.capacities, "recent": self.recent, "since": self.since,
            "packed_rows": self.rows_sharing_slots, "stride": self.stride,
        }  # fmt: skip

    def with_json(self, content: dict) -> "CapacitySchedule":
        """This schedule with the state that `to_json` stored.

        If other rows share slots now than then, as on another number of devices, the stored counts
        do not apply. The capacity is then the largest number that the rows can need together.
        """
        if (crossed := self._rows_crossed(content)) is None:
            return self
        capacities = tuple(min(f, crossed * c) for f, c in zip(self.full, content["capacities"]))
        if not self.has_unit_of(content):
            return replace(self, capacities=capacities)
        recent = tuple(tuple(counts) for counts in content["recent"])
        return replace(self, capacities=capacities, recent=recent, since=content["since"])

    def has_unit_of(self, content: dict) -> bool:
        """Whether the same rows share slots in the content of `to_json` and in this schedule."""
        rows = content.get(
            "packed_rows", self.rows_sharing_slots if self.rows_sharing_slots == 1 else None
        )
        return (rows, content.get("stride", 1)) == (self.rows_sharing_slots, self.stride)

    def _rows_crossed(self, content: dict) -> int | None:
        """Largest number of former rows of slots whose rows now share one row of slots.

        None if unknown: earlier versions did not store how many rows share a row of slots.
        """
        if self.has_unit_of(content) or self.rows_sharing_slots == 1:
            return 1
        if (before := content.get("packed_rows")) is None:
            return None
        if before > 1 and content["stride"] != self.stride:
            return self.rows_sharing_slots
        if before == 1 or self.rows_sharing_slots % before == 0:
            return self.rows_sharing_slots // before
        return (
            1
            if before % self.rows_sharing_slots == 0
            else -(-self.rows_sharing_slots // before) + 1
        )


def needed(counts: tuple[int, ...]) -> float:
    """Number of slots for the next steps, given the recent counts."""
    high = statistics.fmean(counts) + DEVIATIONS * statistics.pstdev(counts)
    return GUARD * max(high, *counts)


def is_steady(counts: tuple[int, ...]) -> bool:
    """Whether the counts vary little."""
    return statistics.pstdev(counts) <= SETTLED * statistics.fmean(counts)
