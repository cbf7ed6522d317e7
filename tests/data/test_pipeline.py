"""Batches: every byte once per epoch; the same run for any workers, processes and restarts."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import hnet
from hnet.config import BOS_ID
from hnet.data import DataConfig, batch_fingerprint, eval_batches, open_corpus, train_batches
from hnet.data.row_order import _PERIOD, RowOrder
from hnet.errors import ConfigError
from tests.data_helpers import jsonl

FIELDS = ("input_ids", "segment_ids", "loss_mask")


def texts_without_repeated_pairs():
    """Cut a text in which no pair of bytes occurs twice (a de Bruijn sequence) into documents."""
    letters = range(40, 100)
    text = [c for i in letters for c in (i, *(x for j in letters if j > i for x in (i, j)))]
    cuts = np.cumsum([0, 7, 1, 300, 2, 511, 40, 1000, 1, 1, 950])
    return [bytes(text[a:b]) for a, b in zip(cuts, [*cuts[1:], None])]


@pytest.fixture
def config(tmp_path):
    texts = [t.decode() for t in texts_without_repeated_pairs()]
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(texts))
    return DataConfig(files=(f"{tmp_path}/pairs.jsonl",), eval_fraction=0, batch_size=4, seq_len=31)


@pytest.fixture
def corpus(config):
    return open_corpus(config)


def take(corpus, config, count, **options):
    with train_batches(corpus, config, **({"seed": 3} | options)) as batches:
        return list(islice(batches, count))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


def scored_pairs(batches):
    pairs = Counter()
    for batch in batches:
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        pairs.update(zip(ids[:, :-1][mask].tolist(), ids[:, 1:][mask].tolist()))
    return pairs


def num_rows(corpus, config):
    tokens = corpus.train.num_bytes + 2 * config.bos_eos * corpus.train.num_documents
    return -(-(tokens - 1) // (config.seq_len - 1))


@pytest.mark.parametrize("bos_eos", [True, False])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_every_byte_is_scored_once_an_epoch(config, process_count, bos_eos):
    config = replace(config, bos_eos=bos_eos)
    corpus = open_corpus(config)
    rows = num_rows(corpus, config)
    # as many epochs as fill whole batches
    epochs = config.batch_size // np.gcd(rows, config.batch_size)
    pairs = Counter()
    for p in range(process_count):
        count = rows * epochs // config.batch_size
        options = {"process_index": p, "process_count": process_count}
        pairs += scored_pairs(take(corpus, config, count, **options))
    expected = Counter()
    for text in texts_without_repeated_pairs():
        expected.update(zip(text, text[1:]))
        if bos_eos:
            expected[BOS_ID, text[0]] += 1
    assert max(n for (a, _), n in expected.items() if a != BOS_ID) == 1
    assert pairs == Counter({pair: n * epochs for pair, n in expected.items()})


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batches_of_one(corpus, config, process_count):
    """Saved after 5 batches by one process, continued by several: the next data are the same."""
    whole = take(corpus, config, 9)
    shards = [
        take(corpus, config, 4, start=5, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    joined = [{n: np.concatenate([b[n] for b in row]) for n in FIELDS} for row in zip(*shards)]
    assert_equal(joined, whole[5:])


def test_position_counts_consumed_batches(corpus, config):
    expected = take(corpus, config, 8)
    with train_batches(corpus, config, seed=3) as batches:
        assert batches.position == 0
        for batch in islice(batches, 5):
            assert set(batch) == set(FIELDS)
        assert batches.position == 5
        assert batches.wait_seconds > 0
        resumed = take(corpus, config, 3, start=batches.position)
    assert_equal(resumed, expected[5:])
    assert resumed[0]["input_ids"].dtype == resumed[0]["segment_ids"].dtype == np.int32
    assert resumed[0]["loss_mask"].dtype == bool


def test_epochs_and_seeds_differ(corpus, config):
    config = replace(config, batch_size=num_rows(corpus, config))
    one, two = take(corpus, config, 2)
    (other,) = take(corpus, config, 1, seed=4)
    rows = [sorted(map(bytes, b["input_ids"])) for b in (one, two, other)]
    assert rows[0] == rows[1] == rows[2]
    assert len({batch_fingerprint(b) for b in (one, two, other)}) == 3


def test_far_positions_need_no_walk(corpus, config):
    (batch,) = take(corpus, config, 1, start=10**12)
    assert batch["input_ids"].shape == (4, 31)


_WITH_WORKERS = """
    import multiprocessing, os, signal, sys
    from itertools import islice
    from hnet.data import *

    if __name__ == "__main__":
        config = DataConfig(files=(sys.argv[1],), eval_fraction=0, batch_size=4, seq_len=31,
                            num_workers=2)
        with train_batches(open_corpus(config), config, seed=3, start=3) as batches:
            for batch in islice(batches, 7):
                print(batch_fingerprint(batch))
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_workers_give_the_same_batches_and_end_with_the_run(tmp_path, corpus, config, end):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(_WITH_WORKERS))
    run = subprocess.run(
        [sys.executable, script, config.files[0], end],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(hnet.__file__).parents[1])},
        timeout=120,
    )
    assert run.returncode == (-signal.SIGKILL if end == "kill" else 0), run.stderr
    *fingerprints, pids = run.stdout.splitlines()
    expected = take(corpus, config, 7, start=3)
    assert fingerprints == [batch_fingerprint(b) for b in expected]
    assert len(pids.split()) == 2
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids.split()):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"workers {pids} outlive the run")


@pytest.fixture
def mixture(config):
    files = (*config.files, "synthetic:greek:5000", "synthetic:dna:3000")
    return replace(config, files=files, weights=(0.55, 0.3, 0.15))


@pytest.mark.parametrize("mixed", [True, False])
def test_source_bytes_count_all_processes(mixture, mixed):
    config = mixture if mixed else replace(mixture, weights=())
    corpus = open_corpus(config)
    counted = np.zeros(3 if mixed else 1, np.int64)
    scored = 0
    for p in range(2):
        with train_batches(corpus, config, seed=1, process_index=p, process_count=2) as batches:
            for k, batch in zip(range(20), batches):
                scored += batch["loss_mask"].sum()
                counted += batches.source_bytes(k) if p == 0 else 0
    assert len(counted) == len(corpus.train.source_names)
    assert counted.sum() == scored
    if mixed:
        np.testing.assert_allclose(counted / scored, config.weights, atol=0.06)


def test_mixture_follows_its_weights_and_each_source_has_whole_epochs():
    weights, rows = (0.55, 0.3, 0.15), [401, 211, 149]
    order = RowOrder(rows, weights, seed=5)
    slots = [order(i) for i in range(2000)]
    counts = np.cumsum([np.arange(3) == s for s, _ in slots], axis=0)
    ideal = np.arange(1, 2001)[:, None] * np.array(weights)
    assert abs(counts - ideal).max() < 2
    for source, n in enumerate(rows):
        drawn = [row for s, row in slots if s == source]
        for epoch in range(len(drawn) // n):
            assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_mixture_goes_on_over_periods():
    order = RowOrder([113, 127], (1, 2), seed=0)
    drawn = [row for s, row in map(order, range(_PERIOD - 200, _PERIOD + 400)) if s == 1]
    assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 2
    assert len(set(drawn)) == 127


@pytest.mark.parametrize("process_count", [1, 3])
@pytest.mark.parametrize("mixed", [True, False])
def test_evaluation_scores_every_byte_of_every_document_once(mixture, process_count, mixed):
    config = mixture if mixed else replace(mixture, weights=())
    config = replace(config, batch_size=6)
    part = open_corpus(config).train
    shards = [
        list(eval_batches(part, config, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    assert len({len(s) for s in shards}) == 1
    bytes_by_document = Counter()
    texts = list(part.texts())
    for batch in (b for s in shards for b in s):
        assert batch["input_ids"].shape == (6 // process_count, 31)
        assert ((batch["document_ids"] >= 0) == (batch["segment_ids"] > 0)).all()
        for d, byte in zip(
            batch["document_ids"][batch["loss_mask"]], batch["input_ids"][batch["loss_mask"]]
        ):
            bytes_by_document[int(d)] += 1
            assert byte in texts[d]
    assert bytes_by_document == {d: part.document_bytes(d) for d in range(part.num_documents)}
    assert (shards[-1][-1]["segment_ids"][-1] == 0).any()


def test_evaluation_of_nothing(corpus, config):
    assert list(eval_batches(corpus.heldout, config)) == []


def test_batch_fingerprint_sees_every_field(corpus, config):
    (batch,) = take(corpus, config, 1)
    seen = {batch_fingerprint(batch)}
    for name in FIELDS:
        other = {n: a.copy() for n, a in batch.items()}
        other[name][0, 0] = not other[name][0, 0]
        seen.add(batch_fingerprint(other))
    seen.add(batch_fingerprint({n: a[::-1] for n, a in batch.items()}))
    assert len(seen) == 5 and all(len(s) == 16 for s in seen)


def test_bad_requests(corpus, config):
    with pytest.raises(ConfigError, match="data.batch_size=4 is not divided by 3 processes"):
        train_batches(corpus, config, seed=0, process_count=3)
    with pytest.raises(ConfigError, match="seed=-1"):
        train_batches(corpus, config, seed=-1)
    with pytest.raises(ConfigError, match="2\\*\\*32"):
        RowOrder([2**32], (), seed=0)
    with pytest.raises(ConfigError, match="below 1/10000"):
        RowOrder([5, 5], (1.0, 1e-6), seed=0)
