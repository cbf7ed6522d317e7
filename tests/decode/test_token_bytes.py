"""Models of tokens as models of bytes: scores and continuations from a network."""

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, normalizers

from hnet.config import BOS_ID
from hnet.data.tokenizers import Wanted
from hnet.data.tokens import read_vocabulary
from hnet.decode.canonical import Canonical
from hnet.decode.covers import Covers, Pieces
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.score import logprobs
from hnet.decode.token_bytes import TokenBytes
from hnet.errors import ConfigError
from tests.networks import network, quick_jit, random_params, stage

SAMPLE = "the cat sat; that hat, the cat sat on the mat — naïve cafés: "
TEXTS = ["", "the cat", "né"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    path.write_text(Wanted("bpe", 280).train([SAMPLE.encode() * 3]))
    return str(path)


@pytest.fixture(scope="module")
def model(file):
    model = nnx.merge(*random_params(network(stage("t1", 26), vocab_size=283)))
    model.tokenizer = file
    return model


@pytest.fixture(scope="module")
def covers_of(model, file):
    """Function from a text to its covers, one forward pass per sequence of tokens."""
    vocabulary, (graph, params) = read_vocabulary(file), nnx.split(model)
    forward = quick_jit(lambda params, ids_BL: nnx.merge(graph, params)(ids_BL)[0])
    pieces, allowed = Pieces(vocabulary.pieces), Canonical(vocabulary, eos=True)

    def log_probs(ids):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        logits_V = forward(params, padded)[0, len(ids) - 1]
        return np.asarray(jax.nn.log_softmax(logits_V))[:280]

    def run(text):
        covers, found = Covers(pieces, allowed, (BOS_ID,)), []
        for byte in [*text, None]:
            covers.feed([log_probs(ids) for ids in covers.waiting])
            found.append(covers.log_probs())
            if byte is not None:
                covers.advance(byte)
        return np.stack(found)

    return run


def test_scores_are_exact_probabilities_of_bytes(model, covers_of):
    for text, score in zip(TEXTS, logprobs(model, TEXTS, batch_size=3)):
        table_LS, byte_L = covers_of(text.encode())[:-1], [*text.encode()]
        expected_L = table_LS[np.arange(len(byte_L)), byte_L]
        np.testing.assert_allclose(score.logprobs, expected_L, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score.is_greedy, table_LS.argmax(axis=1) == byte_L)


def test_tokens_are_one_of_the_ways_to_spell_a_text(model):
    exact = TokenBytes(model)
    text = b"the cat sat"
    ids = (BOS_ID, *read_vocabulary(model.tokenizer).encode(text).tolist())
    table = exact.after([ids[:k] for k in range(1, len(ids))])
    expected = sum(table[ids[:k]][i] for k, i in enumerate(ids) if k)
    found = exact.tokens_log_prob(text)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found < logprobs(model, [text])[0].total()


def test_greedy_bytes_are_the_most_probable_and_rows_do_not_depend_on_others(model, covers_of):
    sampling = Sampling(max_bytes=5, temperature=0.0, eos=False)
    found = generate(model, ["the c", "", "ma"], sampling)
    for prompt, result in zip(["the c", "", "ma"], found):
        data = prompt.encode()
        for logprob in result.logprobs:
            table_S = covers_of(data)[-1]
            table_S[255] = -np.inf
            data += bytes([int(table_S.argmax())])
            assert logprob == pytest.approx(table_S.max(), abs=1e-5)
        assert result.prompt + result.data == data and len(result.data) == 5
    (drawn,) = generate(model, ["the c"], Sampling(max_bytes=9, seed=4))
    score = logprobs(model, [drawn.prompt + drawn.data])[0]
    np.testing.assert_allclose(score.logprobs[5:], drawn.logprobs, rtol=0, atol=1e-5)


def test_what_has_no_exact_probability_is_refused(model, file, tmp_path):
    with pytest.raises(ConfigError, match="bos=False"):
        logprobs(model, ["a"], bos=False)
    with pytest.raises(ConfigError, match="bos=False"):
        generate(model, ["a"], bos=False)
    with pytest.raises(ConfigError, match="byte 193 at offset 1"):
        logprobs(model, [b"a\xc1"])
    library = Tokenizer.from_file(file)
    library.normalizer = normalizers.Lowercase()
    library.save(str(tmp_path / "lower.json"))
    with pytest.raises(ConfigError, match="normalizer"):
        Canonical(read_vocabulary(str(tmp_path / "lower.json")), eos=True)
