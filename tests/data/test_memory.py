"""Text stays on disk: memory does not grow with it, and changes are detected."""

import gzip
import json
import pickle
import tracemalloc
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hnet.data import DataConfig, eval_batches, open_corpus, train_batches
from hnet.data.pipeline import _TrainBatches
from hnet.data.prepare import prepare
from hnet.data.stores import Spool
from hnet.errors import ConfigError
from tests.data_helpers import jsonl

MIB = 1 << 20
PART = ("words of a text, with a \n line, a \\ slash and a Größe " * 20_000)[: MIB // 2]
HALVES = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One document of 20 MiB as plain text, a JSON line and gzip, and many small ones."""
    folder = tmp_path_factory.mktemp("big")
    whole, escaped = PART.encode() * HALVES, json.dumps(PART)[1:-1].encode() * HALVES
    (folder / "one.txt").write_bytes(whole)
    (folder / "one.jsonl").write_bytes(b'{"id": "x", "text": "' + escaped + b'"}\n')
    (folder / "one.txt.gz").write_bytes(gzip.compress(whole, 1))
    (folder / "many.jsonl").write_bytes(jsonl([PART[i : i + 5000] for i in range(0, 99, 3)] * 199))
    return folder


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl", "one.txt.gz", "many.jsonl"])
def test_memory_does_not_grow_with_the_text(folder, name):
    config = DataConfig((str(folder / name),), seq_len=509, batch_size=4)

    def run():
        corpus = open_corpus(config)
        assert corpus.num_bytes > 20 * MIB
        with train_batches(corpus, config, seed=0) as batches:
            list(islice(batches, 3))
        assert list(islice(eval_batches(corpus.heldout, config), 3))

    run()  # imports are no part of it
    assert peak_of(run) < 8 * MIB


def test_memory_of_a_preparation_does_not_grow_with_a_document(folder, tmp_path):
    assert peak_of(lambda: prepare((str(folder / "one.jsonl"),), str(tmp_path / "out"))) < 8 * MIB


def test_all_forms_hold_the_same_document(folder):
    texts = [
        b"".join(open_corpus(DataConfig((str(folder / name),), eval_fraction=0)).train.texts())
        for name in ("one.txt", "one.jsonl", "one.txt.gz")
    ]
    assert texts[0] == PART.encode() * HALVES
    assert texts[1] == texts[2] == texts[0]


def test_rows_of_parquet_are_read_in_groups(tmp_path):
    texts = [f"{i} " * (i % 7) for i in range(5000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=997)
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "b.parquet")
    for name in ("a", "b"):
        config = DataConfig((str(tmp_path / f"{name}.parquet"),), eval_fraction=0)
        assert list(open_corpus(config).train.texts()) == [t.encode() for t in texts if t]


def test_a_worker_maps_the_arrays(folder):
    config = DataConfig((str(folder / "many.jsonl"),), num_workers=1)
    corpus = open_corpus(config)
    batches = _TrainBatches(corpus.train, config, [["Latin"]], 0, (0, 1), False)
    pickled = pickle.dumps(batches)
    assert len(pickled) < 20_000 < corpus.train.documents[0].length_D.nbytes
    copy = pickle.loads(pickled)
    lengths = copy._streams[0].documents.length_D
    while not isinstance(lengths, np.memmap):
        lengths = lengths.base
    for k in range(3):
        for name, array in batches[k].items():
            np.testing.assert_array_equal(copy[k][name], array)


def test_tokens_are_kept_on_the_disk(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["ü" * (MIB + 1), PART * 3, "short"]  # the first two are encoded in parts
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    config = DataConfig(
        (str(tmp_path / "a.jsonl"),), eval_fraction=0, tokenizer=str(tmp_path / "tokenizer.json")
    )
    part = open_corpus(config).train
    (documents,) = part.tokens(config.tokenizer)
    for d, text in enumerate(texts):
        ids = documents.read(d, 0, int(documents.length_D[d]))
        assert ids.tobytes() == np.frombuffer(text.encode(), np.uint8).astype(np.int32).tobytes()
    batches = _TrainBatches(part, replace(config, num_workers=1), (), 0, (0, 1), False)
    copy = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(copy[1]["input_ids"], batches[1]["input_ids"])


@pytest.mark.parametrize("change", ["append", "replace", "shorten", "remove"])
def test_text_that_changes_during_a_run_is_one_line(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text("first text " * 500)
    config = DataConfig((str(path),), eval_fraction=0)
    corpus = open_corpus(config)
    match change:
        case "append":
            with open(path, "a") as f:
                f.write("more")
        case "replace":
            (tmp_path / "other").write_text("other text " * 500)
            (tmp_path / "other").replace(path)
        case "shorten":
            path.write_text("first")
        case "remove":
            path.unlink()
    with pytest.raises(ConfigError, match="a.txt' changed since it was opened") as e:
        list(eval_batches(corpus.train, config))
    assert "\n" not in str(e.value)


def test_a_file_that_grows_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["text"] * 300))
    read = json.loads

    def loads(*args, **options):
        with open(path, "ab") as f:
            f.write(b"\n")
        return read(*args, **options)

    monkeypatch.setattr("hnet.data.json_lines.json.loads", loads)
    with pytest.raises(ConfigError, match="is being written to"):
        open_corpus(DataConfig((str(path),)))


def test_no_room_for_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        Spool()
