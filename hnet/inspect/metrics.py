"""Metrics of boundaries: agreement with gold units, enrichment, chunk lengths, split characters.

Pure NumPy on byte offsets. Offset 0 and the length of a text are always boundaries, so they are not
counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect.gold import inside_character
from hnet.inspect.segmentation import Segmentation

UNDECIDED = (0.4, 0.6)
PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Score:
    """Agreement of predicted with gold boundaries, pooled over texts (micro-average).

    Counts are floats because the hits of a control may be expected values. A ratio with denominator
    0 is 0.
    """

    hits: float
    predicted: float
    gold: float

    @property
    def precision(self) -> float:
        return self.hits / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.hits / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """2 hits / (predicted + gold), the harmonic mean of precision and recall."""
        return 2 * self.hits / (self.predicted + self.gold) if self.predicted + self.gold else 0.0


@dataclass(frozen=True)
class BoundaryScores:
    """Score of a model and of two controls with the same number of boundaries per text."""

    learned: Score
    random: Score
    """expected score of boundaries drawn uniformly"""
    fixed_stride: Score
    """score of evenly spaced boundaries"""


def score_offsets(predicted: Iterable[int], gold: Iterable[int]) -> Score:
    """Score of the boundaries of one text; both are byte offsets strictly inside the text."""
    predicted, gold = set(map(int, predicted)), set(map(int, gold))
    return Score(len(predicted & gold), len(predicted), len(gold))


def stride_boundaries(count: int, length: int) -> np.ndarray:
    """`count` offsets that split `length` bytes into chunks of lengths as equal as possible."""
    return np.arange(1, count + 1) * length // (count + 1)


def boundary_scores(
    segmentations: Iterable[Segmentation], kind: str, *, stage: int = 0
) -> BoundaryScores:
    """Precision, recall and F1 of `stage` against gold `kind`, with rate-matched controls.

    Texts without that kind of gold are skipped. Raises ConfigError if no text has it.
    """
    totals = np.zeros((3, 3))  # learned, random, fixed stride; hits, predicted, gold
    found = False
    for seg in segmentations:
        if kind not in seg.gold:
            continue
        found = True
        gold, cuts, length = seg.gold[kind], seg.boundaries(stage), max(len(seg.data), 1)
        # Mean of a hypergeometric: gold offsets among len(cuts) drawn from length - 1.
        expected = len(cuts) * len(gold) / max(length - 1, 1)
        stride = stride_boundaries(len(cuts), length)
        hits = [score_offsets(cuts, gold).hits, expected, score_offsets(stride, gold).hits]
        totals += [[h, len(cuts), len(gold)] for h in hits]
    if not found:
        raise ConfigError(f"gold kind {kind!r} is in none of the texts: annotate or read it first")
    return BoundaryScores(*(Score(*map(float, row)) for row in totals))


@dataclass(frozen=True)
class Enrichment:
    """Boundary enrichment: mean surprisal of bytes after a boundary over the overall mean."""

    bq: float
    """ratio (sum_t b_t s_{t+1} / sum_t b_t) / mean s; 1 = boundaries unrelated to surprisal"""
    null_mean: float
    null_std: float
    z: float
    """z score (bq - null_mean) / null_std; NaN if all shifts give the same value"""


def boundary_enrichment(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], *, draws: int = 1000, seed: int = 0
) -> Enrichment:
    """B_q of arXiv 2601.22805, compared with circular shifts of the same boundaries.

    rows: (boundary mask, surprisal) of each text, both (L,), where surprisal_t = -log P(x_t | x_<t)
    in the same unit for all texts. The boundary at t is paired with the surprisal of byte t + 1,
    so pass masks as the router returns them: a START boundary starts a chunk at t, an END boundary
    ends a chunk at t. The null distribution has `draws` samples; each shifts every row by its own
    random amount. All results are NaN without boundaries.
    """
    rng = np.random.default_rng(seed)
    at_boundaries, boundaries, total, count = 0.0, 0, 0.0, 0
    null = np.zeros(draws)
    for mask, surprisal in rows:
        b = np.asarray(mask, bool)[:-1]
        s = np.asarray(surprisal, np.float64)[1:]
        if b.shape != s.shape or b.ndim != 1:
            raise ConfigError(
                f"boundary mask {np.shape(mask)} and surprisal {np.shape(surprisal)} "
                "must be equally long rows"
            )
        if len(b) < 2:
            continue
        by_shift = _circular_sums(b, s)
        null += by_shift[rng.integers(1, len(b), draws)]
        at_boundaries += by_shift[0]
        boundaries, total, count = boundaries + b.sum(), total + s.sum(), count + len(s)
    if not boundaries or not total:
        return Enrichment(*[float("nan")] * 4)
    scale = 1 / boundaries / (total / count)
    bq, mean, std = at_boundaries * scale, null.mean() * scale, null.std() * scale
    # Rounding errors of the FFT give a spread up to about this size if all shifts are equal.
    z = (bq - mean) / std if std > 1e-9 * abs(mean) else float("nan")
    return Enrichment(float(bq), float(mean), float(std), float(z))


def _circular_sums(b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """sum_t b_{(t-k) mod n} s_t for every shift k, by the correlation theorem."""
    return np.fft.irfft(np.conj(np.fft.rfft(b.astype(np.float64))) * np.fft.rfft(s), len(b))


def chunk_length_stats(lengths: np.ndarray) -> dict[str, float]:
    """Percentiles, mean, coefficient of variation and maximum of chunk lengths (bytes).

    Keys ``mean``, ``p5`` ... ``p99``, ``cv`` (standard deviation over mean), ``longest``; the mean
    is bytes per chunk over all chunks (micro-average). Empty if there are no chunks.
    """
    lengths = np.asarray(lengths, np.float64)
    if not lengths.size:
        return {}
    return {
        "mean": float(lengths.mean()),
        **{f"p{q}": float(v) for q, v in zip(PERCENTILES, np.percentile(lengths, PERCENTILES))},
        "cv": float(lengths.std() / lengths.mean()),
        "longest": float(lengths.max()),
    }


def utf8_split_frac(segmentations: Iterable[Segmentation], stage: int = 0) -> float:
    """Share of the boundaries of `stage` that fall inside a UTF-8 character."""
    cut = total = 0
    for seg in segmentations:
        starts = seg.stages[stage].starts[1:]
        cut, total = cut + len(inside_character(seg.data, starts)), total + len(starts)
    return cut / total if total else 0.0


def undecided_frac(segmentations: Iterable[Segmentation], stage: int = 0) -> float:
    """Share of the probabilities of `stage` from 0.4 to 0.6, without the first position."""
    probs = np.concatenate([[], *(seg.stages[stage].probs[1:] for seg in segmentations)])
    low, high = UNDECIDED
    return float(((probs >= low) & (probs <= high)).mean()) if probs.size else 0.0


def summarize(segmentations: Sequence[Segmentation]) -> dict[str, float]:
    """Scalars of a set of texts by tag, for TensorBoard and tables.

    For each stage ``stage0/``: ``bytes_per_chunk``, ``chunk_bytes_p50`` and so on, ``chunk_cv``,
    ``chunk_longest``, ``utf8_split_frac``, ``undecided_frac``; for each kind of gold
    ``f1_<kind>`` with ``f1_<kind>_random`` and ``f1_<kind>_stride``; for each route
    ``route_<name>/bytes_per_chunk``, where a chunk belongs to the route of its first byte.
    """
    scalars: dict[str, float] = {}
    kinds = sorted({kind for seg in segmentations for kind in seg.gold})
    for stage in range(max((len(seg.stages) for seg in segmentations), default=0)):
        texts = [seg for seg in segmentations if len(seg.stages) > stage and seg.data]
        if not texts:
            continue
        tag = f"stage{stage}/"
        stats = chunk_length_stats(np.concatenate([seg.chunk_lengths(stage) for seg in texts]))
        scalars[tag + "bytes_per_chunk"] = stats.pop("mean")
        scalars[tag + "chunk_cv"] = stats.pop("cv")
        scalars[tag + "chunk_longest"] = stats.pop("longest")
        scalars |= {f"{tag}chunk_bytes_{name}": value for name, value in stats.items()}
        scalars[tag + "utf8_split_frac"] = utf8_split_frac(texts, stage)
        scalars[tag + "undecided_frac"] = undecided_frac(texts, stage)
        for kind in kinds:
            if any(kind in seg.gold for seg in texts):
                scores = boundary_scores(texts, kind, stage=stage)
                scalars[f"{tag}f1_{kind}"] = scores.learned.f1
                scalars[f"{tag}f1_{kind}_random"] = scores.random.f1
                scalars[f"{tag}f1_{kind}_stride"] = scores.fixed_stride.f1
        scalars |= _by_route(texts, stage)
    return scalars


def _by_route(texts: Sequence[Segmentation], stage: int) -> dict[str, float]:
    """Bytes per chunk by route; a chunk belongs to the route of its first byte."""
    lengths: dict[str, list[int]] = {}
    for seg in texts:
        if seg.routes:
            run_starts, names = zip(*seg.routes)
            run = np.searchsorted(run_starts, seg.stages[stage].starts, side="right") - 1
            for i, length in zip(run, seg.chunk_lengths(stage)):
                lengths.setdefault(names[i], []).append(int(length))
    return {
        f"stage{stage}/route_{name}/bytes_per_chunk": sum(found) / len(found)
        for name, found in sorted(lengths.items())
    }
