"""Cross-entropy, bits per byte, and which bytes are targets."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hnet.chunking.boundaries import Boundaries
from hnet.config import BOS_ID, EOS_ID
from hnet.data.synthetic import MarkovSource
from hnet.loss import batch_metrics, bits_per_byte, next_byte_nll, total_loss, trained_targets
from hnet.train.evaluate import Evaluation
from tests.training import TINY


def test_next_byte_nll_is_the_log_softmax_of_the_position_before():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(3, 7, 11)), rng.integers(0, 11, (3, 7))
    nll = next_byte_nll(jnp.asarray(logits, jnp.float32), jnp.asarray(ids, jnp.int32))
    expected = np.zeros((3, 7))
    for b in range(3):
        for t in range(1, 7):
            p = np.exp(logits[b, t - 1]) / np.exp(logits[b, t - 1]).sum()
            expected[b, t] = -np.log(p[ids[b, t]])
    np.testing.assert_allclose(nll, expected, atol=1e-6)


def test_targets_are_source_bytes_and_each_documents_eos():
    # row: BOS a b EOS BOS 255(a raw byte) EOS pad
    ids = np.array([[BOS_ID, 97, 98, EOS_ID, BOS_ID, 255, EOS_ID, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
    source = np.array([[0, 1, 1, 0, 0, 1, 0, 0]], bool)
    batch = {"input_ids": ids, "segment_ids": segments, "loss_mask": source}
    targets = trained_targets({k: jnp.asarray(v) for k, v in batch.items()})
    assert targets.tolist() == [[False, True, True, True, False, True, True, False]]


def test_an_eos_that_starts_a_row_is_no_target():
    batch = {
        "input_ids": jnp.array([[EOS_ID, BOS_ID, 97]], jnp.int32),
        "segment_ids": jnp.array([[1, 2, 2]], jnp.int32),
        "loss_mask": jnp.array([[False, False, True]]),
    }
    assert trained_targets(batch).tolist() == [[False, False, True]]


def test_bits_per_byte_of_a_known_source_is_its_entropy():
    """The chain's own predictions, given as logits, score its entropy rate over the bytes only."""
    source, length = MarkovSource(), 4001
    data = np.frombuffer(source.sample(length, seed=0), np.uint8).astype(np.int32)
    table = np.maximum(source.log2_transitions() * math.log(2), -1e4)
    logits = jnp.asarray(table[data], jnp.float32)[None]
    nll = np.asarray(next_byte_nll(logits, jnp.asarray(data)[None]))
    mask = np.ones((1, length), bool)
    mask[0, 0] = False  # nothing predicts the first byte
    evaluation = Evaluation()
    batch = {"loss_mask": mask, "document_ids": np.zeros((1, length), np.int32)}
    evaluation.add(batch, {"nll_BL": nll, "positions": length, "num_chunks_S": []})
    exact = -source.log2_prob(data.astype(np.uint8).tobytes())[1:].mean()
    assert evaluation.num_bytes == length - 1
    assert evaluation.bpb == pytest.approx(exact, abs=1e-6)
    assert evaluation.bpb == pytest.approx(source.entropy, abs=0.05)


def test_bits_per_byte_counts_documents_and_not_separators():
    evaluation = Evaluation()
    batch = {
        "loss_mask": np.array([[False, True, True, False, True]]),
        "document_ids": np.array([[0, 0, 0, 0, 1]]),
    }
    metrics = {
        "nll_BL": np.array([[9.0, 1.0, 2.0, 9.0, 4.0]]),
        "positions": 5,
        "num_chunks_S": [2],
    }
    evaluation.add(batch, metrics)
    assert evaluation.nats_by_document == {0: 3.0, 1: 4.0}
    assert evaluation.bytes_by_document == {0: 2, 1: 1}
    assert evaluation.bpb == pytest.approx(7 / (3 * math.log(2)))
    assert evaluation.bytes_per_chunk(0) == 2.5
    assert math.isnan(bits_per_byte(0.0, 0))


def _route(mask, prob, segments):
    wanted = jnp.sum(mask, axis=1, dtype=jnp.int32)
    return Boundaries(prob, mask, segments, wanted, wanted, mask.astype(jnp.float32))


def test_total_loss_adds_weighted_rate_losses():
    rng = np.random.default_rng(1)
    B, L, V = 2, 5, 256
    ids = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], jnp.int32)
    mask = jnp.asarray(np.arange(L)[None] > 0) & (segments != 0)
    batch = {"input_ids": ids, "segment_ids": segments, "loss_mask": mask}
    logits = jnp.asarray(rng.normal(size=(B, L, V)), jnp.float32)
    boundary = jnp.asarray([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
    prob = jnp.asarray([[1, 0.2, 0.7, 0.1, 0.45], [1, 0.9, 0.3, 0, 0]], jnp.float32)
    numbers = ({"target_ratio_R": jnp.array([3.0]), "losses": ({"weight": jnp.float32(0.5)},)},)
    records = [_route(boundary, prob, segments)]
    loss, sums = total_loss(TINY, logits, records, batch, numbers)
    metrics = batch_metrics(TINY, sums, numbers)
    F, G, N = 4 / 8, (1 + 0.2 + 0.7 + 0.1 + 0.45 + 1 + 0.9 + 0.3) / 8, 3.0
    ratio = N / (N - 1) * ((N - 1) * F * G + (1 - F) * (1 - G))
    nll = np.asarray(next_byte_nll(logits, ids))
    ce = nll[np.asarray(trained_targets(batch))].mean()
    assert float(loss) == pytest.approx(ce + 0.5 * ratio, rel=1e-6)
    assert int(metrics["bytes"]) == int(mask.sum())
    assert float(metrics["nats"]) == pytest.approx(nll[np.asarray(mask)].sum(), rel=1e-6)
    assert float(metrics["stage0/boundary_rate"]) == 0.5
    assert float(metrics["stage0/target_rate"]) == pytest.approx(1 / 3)
    assert float(metrics["stage0/bytes_per_chunk"]) == 2.0
    assert int(metrics["stage0/max_slots"]) == 2
    assert float(metrics["stage0/undecided_frac"]) == pytest.approx(1 / 8)
    assert int(metrics["stage0/prob_hist"].sum()) == 8
