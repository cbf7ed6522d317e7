"""How equally a segmentation treats languages, measured on parallel text.

Pure NumPy. The unit of a parallel text is a sentence (a line). A language that needs more chunks
for the same sentences needs more compute. Equal treatment is an equal number of chunks per sentence
(arXiv 2407.08818); this module measures its spread over languages.
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
    """Inequality of positive numbers, one per language."""

    max_over_min: float
    """ratio of maximum to minimum; 1 = equal"""
    cv: float
    """standard deviation (divided by n, not n - 1) over mean; 0 = equal"""
    gini: float
    """mean absolute difference of all pairs over twice the mean; 0 = equal"""


def spread(values: Sequence[float]) -> Spread:
    """Spread of positive numbers. Raises ConfigError for no numbers or a non-positive one."""
    x = np.asarray(values, np.float64)
    if not x.size or not np.all(x > 0):
        raise ConfigError(f"a spread needs positive numbers, not {list(values)}: give more text")
    mean = x.mean()
    differences = np.abs(x[:, None] - x[None, :]).mean()
    return Spread(float(x.max() / x.min()), float(x.std() / mean), float(differences / (2 * mean)))


@dataclass(frozen=True)
class LanguageScore:
    """Results of one system on the sentences of one language."""

    sentences: int
    num_bytes: int
    chunks: tuple[int, ...]
    """number of chunks per stage, outermost first"""
    utf8_split_frac: tuple[float, ...]
    """share of the boundaries inside a UTF-8 character, per stage"""
    nats: float = math.nan
    """-log probability of all scored bytes; NaN if the system is no language model"""
    scored_bytes: int = 0
    """number of bytes that are predicted"""
    words_f1: tuple[float, ...] = ()
    """F1 of the boundaries with gold words, per stage; empty = no gold words"""
    words_f1_random: tuple[float, ...] = ()
    """expected F1 of as many random boundaries, per stage"""

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
    """Score the sentences of one language, all with the same number of stages.

    nats, scored_bytes: results of a language model on the sentences. gold: sentences with gold
    "words", the same or others. Raises ConfigError if there are no sentences.
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
    """Spread over languages of the chunks per sentence of `stage`."""
    return spread([language.chunks_per_sentence[stage] for language in languages])


def mean_bpb(languages: Sequence[LanguageScore]) -> float:
    """Unweighted mean over languages of bits per byte."""
    return float(np.mean([language.bpb for language in languages]))


def cut_at(data: bytes, starts: Iterable[int]) -> Segmentation:
    """Segmentation of a text by given offsets; chunks start at the offsets and at 0."""
    starts = sorted({0, *(int(s) for s in starts if 0 < s < len(data))} if data else [])
    probs = np.zeros(len(data))
    probs[starts] = 1.0
    stage = StageBoundaries(tuple(starts), tuple(probs.tolist()))
    return Segmentation(data, stages=(stage,))
