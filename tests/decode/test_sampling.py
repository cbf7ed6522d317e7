"""Sampling against plain loops over one row."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.config import EOS_ID
from hnet.decode import utf8
from hnet.decode.sampling import Controls, Sampling, keep_likely, penalise, sample
from hnet.errors import ConfigError

keep = jax.jit(keep_likely)
run = jax.jit(sample)
V = 256


def logits_of(seed, rows=1, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, V)).astype(np.float32)


def kept_by_hand(logits_V, top_k, top_p, min_p):
    """The filters in sequence, each on the distribution left by the previous one."""
    order = sorted(range(V), key=lambda v: -logits_V[v])
    left = order[:top_k]
    weights = np.exp(np.float64(logits_V[left]) - logits_V[order[0]])
    weights /= weights.sum()
    nucleus, mass = [], 0.0
    for v, weight in zip(left, weights):
        if mass >= top_p:
            break
        nucleus.append(v)
        mass += weight
    floor = min_p * math.exp(logits_V[order[0]])
    return sorted(v for v in nucleus if math.exp(logits_V[v]) >= floor)


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 40, 256]),
    st.sampled_from([0.05, 0.31, 0.9, 1.0]), st.sampled_from([0.0, 0.011, 0.29, 1.0]),
)  # fmt: skip
def test_filters_keep_what_their_definitions_say(seed, top_k, top_p, min_p):
    logits = logits_of(seed)
    kept = keep(logits, np.int32(top_k), np.float32(top_p), np.float32(min_p))
    assert sorted(np.flatnonzero(np.isfinite(kept[0]))) == kept_by_hand(
        logits[0], top_k, top_p, min_p
    )
    finite = np.isfinite(kept)
    np.testing.assert_array_equal(kept[finite], logits[finite])


def test_repetition_penalty_touches_only_recent_bytes():
    logits = logits_of(1, 2)
    recent = np.array([[-1, 5, 5], [7, 255, 0]], np.int32)
    out = np.array(jax.jit(penalise)(logits, recent, np.float32(1.7)))
    for row, seen in enumerate([{5}, {7, 255, 0}]):
        for v in range(V):
            x = float(logits[row, v])
            expected = x if v not in seen else x / 1.7 if x > 0 else x * 1.7
            assert out[row, v] == pytest.approx(expected, rel=1e-6)


def draws(sampling, logits, seeds, count=0, utf8_state=None):
    rows = len(logits)
    recent = np.full((rows, sampling.repetition_window), -1, np.int32)
    state = np.zeros(rows, np.int32) if utf8_state is None else utf8_state
    return run(
        logits,
        Controls.of(sampling),
        np.asarray(seeds, np.uint32),
        np.full(rows, count, np.int32),
        recent,
        state,
    )


def test_greedy_takes_the_likeliest_and_its_log_probability():
    logits = logits_of(2, 5)
    byte, logprob = draws(Sampling(temperature=0, top_k=3), logits, range(5))
    np.testing.assert_array_equal(byte, logits.argmax(1))
    probs = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(1, keepdims=True)
    np.testing.assert_allclose(logprob, np.log(probs[np.arange(5), byte]), rtol=1e-5)


def test_draws_follow_the_tempered_distribution():
    """A chi-square test over the four bytes that top_k keeps."""
    rows, logits = 4000, np.tile(logits_of(3), (4000, 1))
    byte, _ = draws(Sampling(temperature=1.6, top_k=4), logits, range(rows))
    best = np.argsort(-logits[0])[:4]
    weights = np.exp(logits[0, best] / 1.6)
    expected = rows * weights / weights.sum()
    found = np.array([np.sum(byte == v) for v in best])
    assert found.sum() == rows
    assert np.sum((found - expected) ** 2 / expected) < 16.3  # 0.999 quantile, 3 degrees


def test_a_draw_depends_on_its_seed_and_count_and_not_on_its_place():
    logits = logits_of(4, 3)
    how = Sampling(temperature=3.0)
    byte, _ = draws(how, logits[[0, 1, 2, 0, 1]], [7, 8, 9, 7, 8], count=3)
    swapped, _ = draws(how, logits[[2, 1, 0, 1, 0]], [9, 8, 7, 8, 7], count=3)
    np.testing.assert_array_equal(
        byte, swapped[jnp.array([2, 1, 0, 3, 4])][jnp.array([0, 1, 2, 4, 3])]
    )
    many = np.tile(logits[:1], (64, 1))
    by_seed, _ = draws(how, many, range(64))
    later, _ = draws(how, many, range(64), count=1)
    assert len(set(by_seed.tolist())) > 10 and not np.array_equal(by_seed, later)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(range(8)), st.integers(1, 4))
def test_the_constraint_leaves_valid_bytes_only(seed, state, remaining):
    how = Sampling(max_bytes=4, valid_utf8=True, temperature=4.0)
    logits = logits_of(seed, 5, spread=8.0)
    byte, logprob = draws(
        how, logits, range(5), count=4 - remaining, utf8_state=np.full(5, state, np.int32)
    )
    allowed = set(np.flatnonzero(utf8.allowed(np.array([state]), np.array([remaining]))[0]))
    if state == utf8.START:
        allowed.add(EOS_ID)
    assert set(byte.tolist()) <= allowed
    assert np.all(np.isfinite(logprob))


@pytest.mark.parametrize(
    "field, value",
    [("max_bytes", 0), ("max_bytes", 1 << 31), ("repetition_window", 0), ("top_k", -1),
     ("seed", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1),
     ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("stop", ("",))],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=field) as e:
        replace(Sampling(), **{field: value})
    assert "\n" not in str(e.value)


def test_settings_do_not_compile_again():
    fresh = jax.jit(partial(sample))
    args = (
        np.zeros(2, np.uint32),
        np.zeros(2, np.int32),
        np.zeros((2, 4), np.int32),
        np.zeros(2, np.int32),
    )
    for how in (Sampling(), Sampling(temperature=0, top_k=5, top_p=0.2, valid_utf8=True)):
        fresh(logits_of(0, 2), Controls.of(how), *args)
    assert fresh._cache_size() == 1
