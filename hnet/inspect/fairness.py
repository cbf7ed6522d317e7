"""How equally a way to cut treats languages, on text that says the same in each of them.

Pure NumPy. The unit of a parallel text is a sentence (a line), and a language that needs more
chunks for the same sentences pays more compute for them: equal treatment is an equal number of
chunks a sentence (arXiv 2407.08818), the spread of which is measured here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect.metrics import boundary_scores, utf8_split_frac
from hnet.inspect.segmentation import Segmentation, StageBoundaries


@dataclass(frozen=True)
class Spread:
    """How far positive numbers, one a language, are from being equal."""

    max_over_min: float
    """1 = equal"""
    cv: float
    """standard deviation (of all, not of a sample) over mean; 0 = equal"""
    gini: float
    """mean absolute difference of all pairs over twice the mean; 0 = equal"""


def spread(values: Sequence[float]) -> Spread:
    """Spread of positive numbers. Raises ConfigError for none, or one that is not positive."""
    x = np.asarray(values, np.float64)
    if not x.size or not np.all(x > 0):
        raise ConfigError(f"a spread needs positive numbers, not {list(values)}: give more text")
    mean = x.mean()
    differences = np.abs(x[:, None] - x[None, :]).mean()
    return Spread(float(x.max() / x.min()), float(x.std() / mean), float(differences / (2 * mean)))


@dataclass(frozen=True)
class LanguageScore:
    """What one way to cut did with the sentences of one language."""

    sentences: int
    num_bytes: int
    chunks: tuple[int, ...]
    """of each stage, outermost first"""
    utf8_split_frac: tuple[float, ...]
    """share of each stage's boundaries that lie inside a UTF-8 character"""
    nats: float = math.nan
    """-log probability of all scored bytes; NaN for what is no language model"""
    scored_bytes: int = 0
    """bytes that something predicts"""
    words_f1: tuple[float, ...] = ()
    """agreement of each stage's boundaries with gold words; empty = no gold words"""
    words_f1_random: tuple[float, ...] = ()
    """the same of as many boundaries at random"""

    @property
    def bytes_per_sentence(self) -> float:
        return self.num_bytes / self.sentences

    @property
    def chunks_per_sentence(self) -> tuple[float, ...]:
        return tuple(n / self.sentences for n in self.chunks)

    @property
    def bytes_per_chunk(self) -> tuple[float, ...]:
        return tuple(self.num_bytes / max(n, 1) for n in self.chunks)

    @property
    def bpb(self) -> float:
        """Bits per scored byte."""
        return self.nats / math.log(2) / self.scored_bytes if self.scored_bytes else math.nan

    @property
    def nats_per_sentence(self) -> float:
        return self.nats / self.sentences


def score_language(
    segmentations: Sequence[Segmentation],
    *,
    nats: float = math.nan,
    scored_bytes: int = 0,
    gold: Sequence[Segmentation] = (),
) -> LanguageScore:
    """Score the sentences of one language, all cut by the same stages.

    nats, scored_bytes: of the sentences, from a language model. gold: sentences, these or others,
    with gold "words". Raises ConfigError without sentences.
    """
    if not segmentations:
        raise ConfigError("there is no sentence to score: give files with text")
    stages = range(len(segmentations[0].stages))
    words = [boundary_scores(gold, "words", stage=s) for s in stages] if gold else []
    return LanguageScore(
        sentences=len(segmentations),
        num_bytes=sum(len(seg.data) for seg in segmentations),
        chunks=tuple(sum(len(seg.stages[s].starts) for seg in segmentations) for s in stages),
        utf8_split_frac=tuple(utf8_split_frac(segmentations, s) for s in stages),
        nats=nats,
        scored_bytes=scored_bytes,
        words_f1=tuple(w.learned.f1 for w in words),
        words_f1_random=tuple(w.random.f1 for w in words),
    )


def chunk_spread(languages: Sequence[LanguageScore], stage: int = 0) -> Spread:
    """Spread of the chunks a sentence of `stage` over languages."""
    return spread([language.chunks_per_sentence[stage] for language in languages])


def mean_bpb(languages: Sequence[LanguageScore]) -> float:
    """Mean over languages, each counting alike, of bits per byte."""
    return float(np.mean([language.bpb for language in languages]))


def cut_at(data: bytes, starts: Iterable[int]) -> Segmentation:
    """One text cut by something that is no model: chunks start at these offsets, and at 0."""
    starts = sorted({0, *(int(s) for s in starts if 0 < s < len(data))} if data else [])
    probs = np.zeros(len(data))
    probs[starts] = 1.0
    stage = StageBoundaries(tuple(starts), tuple(probs.tolist()))
    return Segmentation(data, stages=(stage,))
