"""Fairness figures against values computed by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.errors import ConfigError
from hnet.inspect.fairness import chunk_spread, cut_at, mean_bpb, score_language, spread
from hnet.inspect.fairness_report import (
    language_rows,
    plot,
    summary_rows,
    to_json,
    to_markdown,
)
from hnet.inspect.segmentation import Segmentation, StageBoundaries

positive = st.lists(st.floats(0.1, 100), min_size=1, max_size=7)


def test_spread_by_hand():
    found = spread([1, 2, 3, 6])  # mean 3, deviations -2 -1 0 3, pairs differ by 1 2 5 1 4 3
    assert found.max_over_min == 6
    assert found.cv == pytest.approx(math.sqrt(14 / 4) / 3)
    assert found.gini == pytest.approx(2 * 16 / 16 / (2 * 3))
    equal = spread([2.5] * 3)
    assert (equal.max_over_min, equal.cv, equal.gini) == (1, 0, 0)


@given(positive, st.floats(0.1, 10))
def test_gini_is_the_area_above_the_lorenz_curve(values, scale):
    shares = np.concatenate([[0], np.cumsum(np.sort(values)) / np.sum(values)])
    area = np.sum((shares[1:] + shares[:-1]) / 2) / len(values)
    assert spread(values).gini == pytest.approx(1 - 2 * area, abs=1e-9)
    assert spread([scale * v for v in values]).gini == pytest.approx(spread(values).gini, abs=1e-9)


@pytest.mark.parametrize("values", [[], [1, 0], [2, -1], [1, math.nan]])
def test_a_spread_of_what_is_not_positive_is_refused(values):
    with pytest.raises(ConfigError, match="positive"):
        spread(values)


def two_stages(text, outer, inner, gold=()):
    stages = (
        StageBoundaries(outer, (1.0,) * len(text.encode())),
        StageBoundaries(inner, (1.0,) * len(outer)),
    )
    return Segmentation(text.encode(), stages=stages, gold={"words": gold} if gold else {})


def test_language_score_by_hand():
    texts = [two_stages("aя b", (0, 2, 4), (0,)), two_stages("ccc", (0,), (0,))]
    gold = [two_stages("ab cd", (0, 2, 3), (0, 3), gold=(3,))]
    score = score_language(texts, nats=9 * math.log(2), scored_bytes=6, gold=gold)
    assert (score.sentences, score.num_bytes, score.chunks) == (2, 8, (4, 2))
    assert score.chunks_per_sentence == (2, 1) and score.bytes_per_chunk == (2, 4)
    assert score.bytes_per_sentence == 4 and score.nats_per_sentence == 4.5 * math.log(2)
    assert score.bpb == pytest.approx(1.5)
    assert score.utf8_split_frac == (0.5, 0)  # boundaries at 2, inside я, and 4
    assert score.words_f1 == (pytest.approx(2 / 3), 1)
    _, *rows = summary_rows({"two": {"eng": score}})
    assert [row[:4] for row in rows] == [["two", "0", "2.00", "2.0"], ["two", "1", "4.00", "1.0"]]
    (_, (*_, cell)) = language_rows({"two": {"eng": score}})
    assert cell == "2.0 (2.00) / 1.0 (4.00); 1.500 bpb"
    with pytest.raises(ConfigError, match="no sentence"):
        score_language([])


@pytest.fixture
def scores():
    def language(sizes, bpb):
        texts = [cut_at(b"x" * 12, range(0, 12, 12 // n)) for n in sizes]
        scored = {"nats": bpb * math.log(2) * 24, "scored_bytes": 24} if bpb else {}
        return score_language(texts, **scored)

    tokens = {"eng": language([2, 2], 0), "rus|": language([4, 6], 0), "heb": language([12], 0)}
    model = {"eng": language([3, 3], 2.0), "rus|": language([3, 4], 1.0), "heb": language([1], 5.0)}
    return {"tokens": tokens, "model": model}


def test_report_counts_unseen_languages_apart(scores):
    content = json.loads(json.dumps(to_json(scores, {"heb"}), allow_nan=False))
    tokens, model = content["systems"]
    assert tokens["mean_bpb"] is None and model["mean_bpb"] == pytest.approx(1.5)
    assert model["chunks_per_sentence"][0]["max_over_min"] == pytest.approx(3.5 / 3)
    assert tokens["chunks_per_sentence"][0]["mean"] == 3.5
    assert model["languages"]["heb"]["bpb"] == pytest.approx(5.0)
    assert content["unseen"] == ["heb"]
    everything = to_json(scores)["systems"][0]["chunks_per_sentence"][0]["max_over_min"]
    assert everything == 6
    assert mean_bpb(list(scores["model"].values())) == pytest.approx((2 + 1 + 5) / 3)
    assert chunk_spread(list(scores["tokens"].values())[:2]).max_over_min == 2.5


def test_tables_have_a_row_for_each_stage_and_language(scores):
    head, tokens, model = summary_rows(scores, {"heb"})
    row = dict(zip(head, tokens))
    assert (row["system"], row["max/min"], row["mean bpb"]) == ("tokens", "2.500", "-")
    assert dict(zip(head, model))["mean bpb"] == "1.500"
    _, eng, rus, heb = language_rows(scores, {"heb"})
    assert eng == ["eng", "12.0", "2.0 (6.00)", "3.0 (4.00); 2.000 bpb"]
    assert rus[3].startswith("3.5 (") and rus[3].endswith("); 1.000 bpb")
    assert heb[0] == "heb (unseen)"
    text = to_markdown(scores, {"heb"})
    assert "| rus\\| |" in text and text.count("\n|---") == 2


def test_plot_is_a_picture_of_all_bars(scores, tmp_path):
    plot(tmp_path / "a.svg", scores, {"heb"})
    plot(tmp_path / "b.svg", scores, {"heb"})
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert "<svg" in picture and picture.count('id="patch_') >= 6
