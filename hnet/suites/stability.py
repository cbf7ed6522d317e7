"""Boundaries that should not change: with another start of the window, and in bfloat16.

A text is segmented as a whole, and again without its first bytes. The comparison covers the bytes
in both windows, except the first byte of the shorter window, at which a chunk always starts.
"""

from collections.abc import Sequence

from hnet.errors import ConfigError
from hnet.inspect.metrics import Score, score_offsets
from hnet.inspect.segmentation import Segmentation
from hnet.suites.items import Report, Row, Settings
from hnet.suites.scorer import Scorer

SHIFTS = (1, 7, 64)


def run(scorer: Scorer, settings: Settings) -> Report:
    if not scorer.alignments:
        raise ConfigError("suite stability: the model cuts nowhere, it has one stage")
    texts = settings.texts
    whole, rows = scorer.boundaries(texts), []
    for shift in SHIFTS:
        long = [seg for seg in whole if len(seg.data) > shift + 1]
        if long:
            shifted = scorer.boundaries([seg.data[shift:] for seg in long])
            rows += compare(f"window + {shift}", long, shifted, shift)
    rows += compare("bfloat16", whole, scorer.in_bfloat16().boundaries(texts), 0)
    return {"stability": rows}


def compare(
    what: str, before: Sequence[Segmentation], after: Sequence[Segmentation], shift: int
) -> list[Row]:
    """One row per stage. flipped: share of bytes at which only one of the two has a boundary; f1:
    agreement of the boundaries."""
    rows = []
    for stage in range(len(before[0].stages)):
        scores, num_bytes = [], 0
        for a, b in zip(before, after):
            shared = a.boundaries(stage) - shift
            scores.append(score_offsets(shared[shared > 0], b.boundaries(stage)))
            num_bytes += max(len(b.data) - 1, 0)
        total = Score(*(sum(getattr(s, n) for s in scores) for n in ("hits", "predicted", "gold")))
        flipped = total.predicted + total.gold - 2 * total.hits
        rows.append(
            {
                "change": what,
                "stage": stage,
                "flipped": flipped / max(num_bytes, 1),
                "f1": total.f1 if total.predicted + total.gold else None,
                "boundaries": int(total.predicted),
            }
        )
    return rows
