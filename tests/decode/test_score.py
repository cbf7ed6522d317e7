"""Scores of texts against the forward pass, one text at a time."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.tokenizer import next_bytes
from hnet.config import BOS_ID
from hnet.decode.cache_memory import check_rows
from hnet.decode.score import logprobs
from hnet.errors import ConfigError
from hnet.model import HNetLM
from tests.networks import network, quick_jit, random_params, stage

CONFIG = network(stage("t1 t1", 26), stage("t1", 26))
TEXTS = ["", "a", "some longer text", b"\xff\x00", "né", "x" * 17]


@pytest.fixture(scope="module")
def model() -> HNetLM:
    return nnx.merge(*random_params(CONFIG))


@pytest.fixture(scope="module")
def by_hand(model):
    graph, params = nnx.split(model)

    @quick_jit
    def log_probs(params, ids_BL):
        return jax.nn.log_softmax(nnx.merge(graph, params)(ids_BL)[0], axis=-1)

    def one(data: bytes):
        padded = np.zeros((1, 20), np.int32)
        padded[0, : len(data)] = list(data)
        table = np.asarray(log_probs(params, padded))[0]
        pairs = list(enumerate(data[1:]))
        return (
            [table[t, byte] for t, byte in pairs],
            [table[t].argmax() == byte for t, byte in pairs],
        )

    return one


@pytest.mark.parametrize("bos", [True, False])
def test_scores_are_log_probabilities_by_byte_offset(model, by_hand, bos):
    found = logprobs(model, TEXTS, bos=bos, batch_size=4)
    for text, score in zip(TEXTS, found):
        data = text if isinstance(text, bytes) else text.encode()
        assert score.data == data and len(score.logprobs) == len(score.is_greedy) == len(data)
        expected, greedy = by_hand(bytes([BOS_ID]) + data if bos else data)
        unscored = 0 if bos else min(1, len(data))
        assert np.all(np.isnan(score.logprobs[:unscored]))
        np.testing.assert_allclose(score.logprobs[unscored:], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score.is_greedy[unscored:], greedy)
    assert found[2].total(5, 11) == pytest.approx(float(found[2].logprobs[5:11].sum()), rel=1e-6)


def test_next_bytes_of_windows_are_those_of_the_scores(model):
    prefixes = [b"", b"som"]
    for prefix, prob_S in zip(prefixes, next_bytes(model)(prefixes)):
        for byte in b"e\xc3":
            (score,) = logprobs(model, [prefix + bytes([byte])])
            assert np.log(prob_S[byte]) == pytest.approx(score.logprobs[-1], abs=1e-5)


def test_bad_batch_size_is_refused(model):
    with pytest.raises(ConfigError, match="batch_size=0"):
        logprobs(model, ["a"], batch_size=0)
    assert logprobs(model, []) == []


def test_rows_that_do_not_fit_into_memory_are_refused():
    check_rows(8, 512, 256)
    with pytest.raises(ConfigError, match="batch_size=8: 8 rows of 1099511627776 positions need"):
        check_rows(8, 1 << 40, 256)
