"""Merges of a batch, and embeddings of the new tokens by a hypernetwork."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.retokenize import Merger, total_nats
from hnet.data.batch_merges import merge_batch
from hnet.data.packing import Stream
from hnet.data.tokenizers import wanted
from hnet.data.tokens import TokenDocuments, read_vocabulary
from hnet.errors import ConfigError
from hnet.loss import next_byte_nll
from hnet.nn.hypernetwork import Hypernetwork
from tests.data_helpers import make_documents
from tests.networks import network, quick_jit, random_params, stage

TEXTS = [b"the cat sat on the mat, the hat sat", b"that cat, that hat; the mats"]
BASE = 283


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    path.write_text(wanted("bpe:262").train(TEXTS))
    return read_vocabulary(str(path))


@pytest.fixture(scope="module")
def batch(vocabulary):
    stream = Stream(TokenDocuments(make_documents(TEXTS), vocabulary), seq_len=23, bos_eos=True)
    rows = [stream.row(r) for r in range(stream.num_rows)]
    return {name: np.stack([getattr(row, name) for row in rows]) for name in rows[0]._fields}


def test_the_most_frequent_pairs_are_merged_where_they_may():
    rows = [[(i,) for i in row] for row in ([1, 2, 1, 2, 3, 1], [1, 2, 3, 3, 3])]
    anywhere, nowhere = (lambda a, b: True), (lambda a, b: False)
    assert merge_batch(rows, 0, anywhere) == (rows, 0) == merge_batch(rows, 9, nowhere)
    assert merge_batch(rows, 1, anywhere) == (
        [[(1, 2), (1, 2), (3,), (1,)], [(1, 2), (3,), (3,), (3,)]], 1
    )  # fmt: skip
    assert merge_batch(rows, 2, anywhere)[0][0] == [(1, 2), (1, 2, 3), (1,)]
    assert merge_batch(rows, 9, anywhere, most=2)[0][1] == [(1, 2), (3, 3), (3,)]
    assert merge_batch([[(1,), (2,), (3,)]], 9, anywhere) == ([[(1,), (2,), (3,)]], 0)


def test_merges_stay_inside_words_and_keep_all_bytes(vocabulary, batch):
    merger, pieces = Merger(vocabulary, 9), vocabulary.pieces
    none, some = merger(batch, 0, BASE), merger(batch, 9, BASE)
    for name in ("input_ids", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(none[name], batch[name])
    assert (none["spelling_NK"] == -1).all()
    assert some["loss_mask"].sum() < batch["loss_mask"].sum()
    assert some["bytes"].sum() == none["bytes"].sum() == sum(map(len, TEXTS))
    spelled = [[i for i in row if i >= 0] for row in some["spelling_NK"].tolist()]
    for row, old in zip(some["input_ids"], batch["input_ids"]):
        ids = [i for t in row for i in (spelled[t - BASE] if t >= BASE else [t])]
        assert ids[: len(old)] == old[: len(ids)].tolist() or not any(ids[len(old) :])
    for word in filter(None, spelled):
        text = b"".join(pieces[i] for i in word).decode()
        assert " " not in text[1:] and (text.strip().isalpha() or not any(map(str.isalpha, text)))


def test_without_merges_it_is_the_model_and_training_helps_with_them(vocabulary, batch):
    graph, params = random_params(network(stage("t1", 26), vocab_size=BASE))
    hyper_graph, weights = nnx.split(Hypernetwork(26, rngs=nnx.Rngs(1)))
    merger = Merger(vocabulary, 9)

    def nats_of(weights, params, batch):
        return total_nats(nnx.merge(hyper_graph, weights), nnx.merge(graph, params), batch)

    step = quick_jit(jax.value_and_grad(nats_of))
    ids_BL, segments_BL = batch["input_ids"], batch["segment_ids"]
    logits, _ = quick_jit(lambda p: nnx.merge(graph, p)(ids_BL, segments_BL))(params)
    expected = np.sum(next_byte_nll(logits, ids_BL), where=batch["loss_mask"])
    none, some = merger(batch, 0, BASE), merger(batch, 9, BASE)
    assert float(step(weights, params, none)[0]) == pytest.approx(float(expected), rel=1e-5)
    found = []
    for _ in range(3):
        value, gradient = step(weights, params, some)
        found.append(float(value))
        weights = jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradient)
    assert found[2] < found[1] < found[0]


def test_embeddings_are_means_at_first():
    rng = np.random.default_rng(0)
    old_NKD = jnp.asarray(rng.normal(size=(2, 4, 26)), jnp.float32)
    mask_NK = jnp.array([[True, True, False, False], [True] * 4])
    graph, weights = nnx.split(Hypernetwork(26, rngs=nnx.Rngs(1)))
    run = quick_jit(lambda weights, *inputs: nnx.merge(graph, weights)(*inputs))
    in_ND, out_ND = run(weights, old_NKD, 2 * old_NKD, mask_NK)
    expected = [old_NKD[0, :2].mean(0), old_NKD[1].mean(0)]
    np.testing.assert_allclose(in_ND, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(out_ND, 2 * np.stack(expected), rtol=0, atol=1e-6)


def test_tokens_without_words_are_refused(tmp_path):
    (tmp_path / "lib").write_text(wanted("lib:260").train(TEXTS))
    with pytest.raises(ConfigError, match="has no words"):
        Merger(read_vocabulary(str(tmp_path / "lib")), 3)
