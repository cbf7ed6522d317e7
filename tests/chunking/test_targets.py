"""Target ratios found for parallel text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.chunking.targets import equal_chunk_ratios


def chunks(bytes_LR, ratios_R):
    return [sum(b / N for b, N in zip(row, ratios_R)) for row in bytes_LR]


@given(st.lists(st.integers(50, 5000), min_size=2, max_size=6), st.floats(2.0, 9.0))
def test_a_route_a_language_gets_its_share_of_bytes(sizes, mean_ratio):
    ratios = equal_chunk_ratios(np.diag(sizes), mean_ratio)
    # C chunks each: sum(sizes) / (L C) = mean_ratio, and N_l = sizes_l / C
    expected = np.array(sizes) * mean_ratio * len(sizes) / sum(sizes)
    np.testing.assert_allclose(ratios, expected, rtol=1e-9)


@given(st.data())
@settings(max_examples=30)
def test_mixed_languages_are_equal_where_that_is_possible(data):
    """Every language has its own route and routes that it shares with others."""
    L = data.draw(st.integers(2, 5))
    draw = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=L, max_size=L))
    bytes_LR = np.concatenate([np.diag(draw(400, 900)), np.array([draw(0, 300), draw(0, 3)]).T], 1)
    ratios = equal_chunk_ratios(bytes_LR, 4.0)
    got = chunks(bytes_LR, ratios)
    np.testing.assert_allclose(got, got[0], rtol=1e-4)
    assert bytes_LR.sum() / sum(got) == pytest.approx(4.0)
    assert np.all(ratios > 0)


def test_languages_of_one_route_share_its_rate():
    bytes_LR = np.array([[100, 0], [140, 0], [0, 300]])
    ratios = equal_chunk_ratios(bytes_LR, 5.0)
    one, two, three = chunks(bytes_LR, ratios)
    assert one / two == pytest.approx(100 / 140)
    # by bytes in the logarithm, the two lie as far below the other as above it
    assert 100 * np.log(one / three) + 140 * np.log(two / three) == pytest.approx(0, abs=1e-6)
    assert 540 / (one + two + three) == pytest.approx(5.0)


def test_a_rate_that_no_language_depends_on_stays_moderate():
    bytes_LR = np.array([[1, 1000, 0, 0], [0, 0, 3000, 0]])
    ratios = equal_chunk_ratios(bytes_LR, 6.0)
    assert ratios[3] == 6.0
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)
