import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from hnet.errors import ConfigError
from hnet.inspect import metrics
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from tests.inspect_samples import probe_texts, segment

OFFSETS = st.sets(st.integers(1, 30))


def cut_at(length, starts, gold=None, probs=None, **more):
    probs = tuple([0.0] * length if probs is None else probs)
    stage = StageBoundaries((0, *starts), probs)
    return Segmentation(bytes(length), stages=(stage,), gold=gold or {}, **more)


@given(OFFSETS, OFFSETS)
def test_score_counts_by_looking_at_every_offset(predicted, gold):
    hits = sum(o in predicted and o in gold for o in range(31))
    score = metrics.score_offsets(predicted, gold)
    assert (score.hits, score.predicted, score.gold) == (hits, len(predicted), len(gold))
    if score.precision and score.recall:
        harmonic = 2 / (1 / score.precision + 1 / score.recall)
        assert score.f1 == pytest.approx(harmonic)


def test_scores_pool_counts_over_texts():
    texts = [
        cut_at(7, (3,), {"words": (3, 5)}),
        cut_at(11, (2, 4), {"words": (4,)}),
        cut_at(5, (1,)),  # without gold: left out
    ]
    learned = metrics.boundary_scores(texts, "words").learned
    assert (learned.hits, learned.predicted, learned.gold) == (2, 3, 3)
    with pytest.raises(ConfigError, match="'morphemes'"):
        metrics.boundary_scores(texts, "morphemes")


def test_random_control_is_what_drawn_boundaries_hit():
    """The mean over sets sampled without replacement from 1 ... L - 1, pooled over texts."""
    rng = np.random.default_rng(0)
    texts = [
        cut_at(11, range(1, 10, 2), {"words": (1, 2, 3, 5, 8)}),
        cut_at(23, (4,), {"words": (3, 7)}),
        cut_at(1, (), {"words": ()}),
    ]
    drawn = 0.0
    for text in texts:
        cuts, gold = len(text.boundaries(0)), {*text.gold["words"]}
        offsets = np.arange(1, len(text.data))
        drawn += np.mean([len(gold & {*rng.permutation(offsets)[:cuts]}) for _ in range(2000)])
    random = metrics.boundary_scores(texts, "words").random
    assert (random.predicted, random.gold) == (6, 7)
    assert random.hits == pytest.approx(drawn, rel=0.03)
    everywhere = cut_at(11, range(1, 11), {"words": (2, 5)})
    assert metrics.boundary_scores([everywhere], "words").random.hits == 2


@given(st.integers(2, 41), st.data())
def test_stride_control_is_as_even_as_possible(length, data):
    count = data.draw(st.integers(0, length - 1))
    cuts = metrics.stride_boundaries(count, length)
    lengths = np.diff([0, *cuts, length])
    assert len(cuts) == count and lengths.min() >= 1 and np.ptp(lengths) <= 1


def test_stride_finds_a_regular_text_and_chance_does_not():
    text = cut_at(60, (6, 7, 8, 9, 11), {"words": (10, 20, 30, 40, 50)})
    scores = metrics.boundary_scores([text], "words")
    assert scores.fixed_stride.f1 == 1
    assert scores.learned.f1 == 0
    assert 0 < scores.random.f1 < 0.4


def enrichment_oracle(mask, surprisal):
    at = [surprisal[t + 1] for t in range(len(mask) - 1) if mask[t]]
    return np.mean(at) / np.mean(surprisal[1:])


@given(st.integers(3, 29), st.integers(0, 2**31))
def test_enrichment_and_its_null_by_plain_loops(length, seed):
    rng = np.random.default_rng(seed)
    mask, s = rng.random(length) < 0.4, rng.exponential(size=length)
    mask[0] = True
    found = metrics.boundary_enrichment([(mask, s)], draws=4000)
    assert found.bq == pytest.approx(enrichment_oracle(mask, s))
    shifted = [np.roll(mask[:-1], k) for k in range(1, length - 1)]
    null = [enrichment_oracle(np.append(m, False), s) for m in shifted]
    assert found.null_mean == pytest.approx(np.mean(null), rel=0.2)
    assert found.null_std == pytest.approx(np.std(null), rel=0.2, abs=1e-9)


def test_enrichment_pools_rows_and_sees_boundaries_before_surprise():
    rng = np.random.default_rng(0)
    rows = []
    for length in (101, 211):
        s = rng.exponential(size=length)
        rows.append((np.append(s[1:] > 1.5, False), s))
    found = metrics.boundary_enrichment(rows)
    sums = [s[1:][m[:-1]].sum() for m, s in rows]
    counts = [m.sum() for m, _ in rows]
    mean = np.concatenate([s[1:] for _, s in rows]).mean()
    assert found.bq == pytest.approx(sum(sums) / sum(counts) / mean)
    assert found.bq > 2 and found.z > 5 and found.null_mean == pytest.approx(1, abs=0.05)


def test_enrichment_without_information():
    everywhere = metrics.boundary_enrichment([(np.ones(9), np.arange(9.0))])
    assert everywhere.bq == 1 and np.isnan(everywhere.z)
    assert np.isnan(metrics.boundary_enrichment([(np.zeros(9), np.arange(9.0))]).bq)
    with pytest.raises(ConfigError, match="equally long"):
        metrics.boundary_enrichment([(np.ones(3), np.ones(4))])


def test_chunk_lengths():
    stats = metrics.chunk_length_stats(np.array([1, 2, 3, 10]))
    assert stats["mean"] == 4 and stats["longest"] == 10 and stats["p50"] == 2.5
    assert stats["cv"] == pytest.approx(np.sqrt((9 + 4 + 1 + 36) / 4) / 4)
    assert metrics.chunk_length_stats(np.array([])) == {}


def test_splits_and_undecided():
    data = "é€a".encode()  # characters start at 0, 2, 5
    stage = StageBoundaries((0, 1, 2, 4), (1, 0.4, 0.5, 0.7, 0.61, 0.39))
    seg = Segmentation(data, stages=(stage,))
    assert metrics.utf8_split_frac([seg]) == 2 / 3
    assert metrics.undecided_frac([seg]) == 2 / 5
    assert metrics.utf8_split_frac([]) == metrics.undecided_frac([]) == 0


def test_summary_by_stage_gold_and_route():
    text = cut_at(12, (4, 6), {"words": (4,)}, routes=((0, "Latin"), (5, "Han")))
    found = metrics.summarize([text])
    assert found["stage0/bytes_per_chunk"] == 4
    assert found["stage0/chunk_bytes_p50"] == 4 and found["stage0/chunk_longest"] == 6
    assert found["stage0/f1_words"] == pytest.approx(2 / 3)
    assert {"stage0/f1_words_random", "stage0/f1_words_stride"} <= set(found)
    assert found["stage0/route_Latin/bytes_per_chunk"] == 3  # chunks of 4 and 2 bytes start there
    assert found["stage0/route_Han/bytes_per_chunk"] == 6
    assert all(np.isfinite(v) for v in found.values())
    assert metrics.summarize([]) == {}


def test_learning_shows_in_the_summary():
    rng = np.random.default_rng(0)
    before, after = (
        metrics.summarize([segment(t, skill, rng) for t in probe_texts()]) for skill in (0, 1)
    )
    assert before["stage0/f1_words"] < 0.5 < after["stage0/f1_words"]
    assert before["stage0/utf8_split_frac"] > after["stage0/utf8_split_frac"]
