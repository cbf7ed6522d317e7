"""Bits per byte by script and by source, against a plain walk over the characters."""

import math
import unicodedata
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.commands.evaluate import perplexity
from hnet.config import BOS_ID
from hnet.data import DataConfig, eval_batches, open_corpus, scripts, train_batches
from hnet.data.corpus import open_part
from hnet.errors import ConfigError
from hnet.loss import next_byte_nll
from hnet.train.evaluate import Evaluation
from hnet.train.groups import group_bpb, group_sums

TEXTS = {
    "a": "plain words, 12 of them",
    "b": "Слово и 漢字 и word: 文 — ok",
    "c": "  \u0301e\u0301 नमस्ते 😀 где",
}
SCRIPTS = {"LATIN": "Latin", "CYRILLIC": "Cyrillic", "CJK": "Han", "DEVANAGARI": "Devanagari"}


def scripts_of(text):
    """Script of each byte: that of its character, or of the last one before that has one."""
    script = "Common"
    for char in text:
        first, *others = unicodedata.name(char).split()
        if char.isalpha() or (first == "DEVANAGARI" and "SIGN" in others):
            script = SCRIPTS[first]
        yield from [script] * len(char.encode())


@pytest.mark.parametrize("bos_eos", [True, False])
@pytest.mark.parametrize("seq_len, batch_size", [(7, 50), (13, 23), (64, 8), (5, 50)])
def test_bits_per_byte_by_script_and_source(tmp_path, seq_len, batch_size, bos_eos):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    part = open_part((f"{tmp_path}/[ab].txt", f"{tmp_path}/c.txt"))
    config = DataConfig(seq_len=seq_len, batch_size=batch_size, bos_eos=bos_eos)
    evaluation = Evaluation(source_of=part.glob_of)
    nats, sizes, of_bases = defaultdict(float), defaultdict(int), []
    expected = {d: [*scripts_of(text)] for d, text in enumerate(TEXTS.values())}
    place, last = defaultdict(int), -1
    rng = np.random.default_rng(0)
    for batch in eval_batches(part, config):
        nll = rng.uniform(0, 8, batch["input_ids"].shape)
        evaluation.add(batch, {"nll_BL": nll, "positions": 1, "num_chunks_S": []})
        for row, own in zip(
            zip(batch["input_ids"], batch["document_ids"], batch["loss_mask"]), nll
        ):
            for t, (byte, document, scored) in enumerate(zip(*row)):
                if t == 0 and document == last:
                    continue  # the token shared by two rows
                last = document
                if document < 0 or byte == BOS_ID or place[document] == len(expected[document]):
                    continue  # padding, BOS, EOS
                if scored:
                    of_bases += [own[t]] * (byte in b"word\n")
                    for kind in (expected[document][place[document]], part.glob_of(document)):
                        nats[kind] += own[t]
                        sizes[kind] += 1
                place[document] += 1
    bpb = {kind: nats[kind] / sizes[kind] / math.log(2) for kind in nats}
    by_source = {name: pytest.approx(bpb.pop(name)) for name in part.globs}
    assert evaluation.bpb_by_source() == by_source
    assert evaluation.bpb_by_script() == {name: pytest.approx(value) for name, value in bpb.items()}
    assert evaluation.metrics()["eval/script_Han/bpb"] == pytest.approx(bpb["Han"])
    expected = {"alphabet": "word\n", "alphabet_bytes": len(of_bases)}
    expected["perplexity"] = pytest.approx(math.exp(np.mean(of_bases)))
    assert perplexity(evaluation, "word\n") == expected
    with pytest.raises(ConfigError, match="alphabet='Z': no scored byte is one of them"):
        perplexity(evaluation, "Z")
    assert evaluation.nats_Z.sum() == pytest.approx(evaluation.nats)


def test_training_batches_tell_sources_and_scripts_apart(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text * 2, encoding="utf-8")
    config = DataConfig((f"{tmp_path}/[ab].txt", f"{tmp_path}/c.txt"), seq_len=17, batch_size=7,
                        eval_fraction=0)  # fmt: skip
    corpus, evaluation, known = open_corpus(config), Evaluation(), {}
    for batch in eval_batches(corpus.train, config):
        sources = [
            [corpus.train.globs.index(corpus.train.glob_of(max(int(d), 0))) for d in row]
            for row in batch["document_ids"]
        ]
        for ids, own, script in zip(batch["input_ids"], sources, evaluation._scripts(batch)):
            known[ids.tobytes()] = own, script.tolist()
    with train_batches(corpus, config, seed=3, tells_sources=True) as batches:
        batch = next(batches)
    for ids, own, script in zip(*(batch[n] for n in ("input_ids", "source_ids", "script_ids"))):
        expected, of_rows = known[ids.tobytes()]
        kept = 14  # a character that the next row completes has no script yet
        assert own.tolist() == expected and script[1:kept].tolist() == of_rows[1:kept]
    logits_BLV = np.random.default_rng(0).normal(size=(7, 17, 256)).astype(np.float32)
    fed = {name: jnp.asarray(array) for name, array in batch.items()}
    sums = group_sums(jnp.asarray(logits_BLV), fed, 2)
    nll_BL = np.asarray(next_byte_nll(jnp.asarray(logits_BLV), fed["input_ids"]))
    found = group_bpb(jax.device_get(sums), corpus.train.globs)
    assert {"train/source_c.txt/bpb", "train/script_Han/bpb"} <= found.keys()
    for kind, names in (("source", ("[ab].txt", "c.txt")), ("script", scripts.SCRIPTS)):
        for i, name in enumerate(names):
            own = batch["loss_mask"] & (batch[f"{kind}_ids"] == i)
            if own.any():
                expected = nll_BL[own].mean() / math.log(2)
                assert found[f"train/{kind}_{name}/bpb"] == pytest.approx(expected, rel=1e-5)
    one = [{"source_nats": np.array([1.0, 0]), "source_bytes": np.array([3.0, 0])}, ("a", "b")]
    assert group_bpb(*one) == group_bpb({}, ()) == {}


def test_scripts_of_several_batches(tmp_path):
    """Only characters split over two batches may count for another script."""
    (tmp_path / "a.txt").write_text(" ".join(TEXTS.values()) * 3, encoding="utf-8")
    part, found = open_part((f"{tmp_path}/a.txt",)), []
    for batch_size in (200, 3, 1):
        evaluation, batches = Evaluation(), 0
        for batch in eval_batches(part, DataConfig(seq_len=11, batch_size=batch_size)):
            nll = np.ones(batch["input_ids"].shape)
            evaluation.add(batch, {"nll_BL": nll, "positions": 1, "num_chunks_S": []})
            batches += 1
        found.append((evaluation.bytes_Z, batches))
        moved = np.abs(evaluation.bytes_Z - found[0][0]).sum() / 2
        assert evaluation.bytes_Z.sum() == part.num_bytes and moved <= 0.4 * (batches - 1)
    assert found[0][1] == 1 and found[2][1] > 30


def test_one_source_and_one_script_are_not_told_apart(tmp_path):
    (tmp_path / "a.txt").write_text("only letters")
    part = open_part((f"{tmp_path}/a.txt",))
    evaluation = Evaluation(source_of=part.glob_of)
    for batch in eval_batches(part, DataConfig(seq_len=8, batch_size=2)):
        nll = np.ones(batch["input_ids"].shape)
        evaluation.add(batch, {"nll_BL": nll, "positions": 1, "num_chunks_S": []})
    assert evaluation.metrics().keys() == {"eval/bpb", "eval/bytes"}
