"""Shards: reading them back, and that no interruption loses or repeats a document."""

import json
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import hnet.data.prepare as module
from hnet.command_line import exit_code
from hnet.data import DataConfig, batch_fingerprint, open_corpus, open_part, train_batches
from hnet.data.__main__ import main
from hnet.data.prepare import prepare
from hnet.data.shards import RECORD_BYTES
from hnet.errors import ConfigError
from tests.data_helpers import jsonl

TEXTS = [
    "x",
    "two records " * 3000,
    "",
    "z" * 2 * RECORD_BYTES,
    "ünï" * 99,
    *(f"text {i} " * 50 for i in range(30)),
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.txt").write_bytes(b"\xff raw " * 999)
    return (f"{tmp_path}/a.jsonl", f"{tmp_path}/*.txt")


def shards_of(out):
    return (f"{out}/*.array_record",)


def test_round_trip(files, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(files, str(out), shard_bytes=10_000)
    part = open_part(shards_of(out))
    expected = list(open_part(files).texts())
    assert list(part.texts()) == expected
    assert manifest["complete"] and manifest["documents"] == len(expected)
    assert manifest["bytes"] == part.num_bytes == sum(map(len, expected))
    assert len(manifest["shards"]) > 2
    assert [i["path"] for i in manifest["inputs"]] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt"]
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert part.document_name(1) == f"{out}/shard-00000.array_record:2"
    # a piece in the middle of a document that is cut into records
    middle = part.documents[0].read(1, RECORD_BYTES - 3, RECORD_BYTES + 5)
    assert middle.tobytes() == expected[1][RECORD_BYTES - 3 : RECORD_BYTES + 5]


def test_rows_of_shards_equal_rows_of_text(files, tmp_path):
    prepare(files, str(tmp_path / "out"), shard_bytes=10_000)
    fingerprints = []
    for patterns in (files, shards_of(tmp_path / "out")):
        config = DataConfig(files=patterns, eval_fraction=0, seq_len=61)
        with train_batches(open_corpus(config), config, seed=0) as batches:
            fingerprints.append([batch_fingerprint(next(batches)) for _ in range(20)])
    assert fingerprints[0] == fingerprints[1]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, documents):
    """Make the preparation fail when it asks for more than this number of documents."""
    read, count = module.read_chunks, 0

    def reader(path):
        nonlocal count
        for chunk in read(path):
            if count == documents:
                raise Killed
            count += chunk.ends
            yield chunk

    monkeypatch.setattr(module, "read_chunks", reader)


@pytest.mark.parametrize("documents", [0, 1, 2, 11, 35])
def test_resume_after_a_kill(files, tmp_path, monkeypatch, documents):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = prepare(files, str(whole), 7000)
    with monkeypatch.context() as patched:
        kill_after(patched, documents)
        with pytest.raises(Killed):
            prepare(files, str(out), 7000)
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    if finished:
        with pytest.raises(ConfigError, match="unfinished"):
            open_part(shards_of(out))
    assert prepare(files, str(out), 7000) == expected
    for name, modified in finished.items():
        assert (out / name).stat().st_mtime_ns == modified
    assert list(open_part(shards_of(out)).texts()) == list(open_part(shards_of(whole)).texts())
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))


def test_death_between_the_two_files_of_a_shard(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:

        def replace(old, new):
            if str(new).endswith("shard-00001.array_record"):
                raise Killed
            os.rename(old, new)

        patched.setattr("hnet.data.shards.os.replace", replace)
        with pytest.raises(Killed):
            prepare(files, str(out), 7000)
    prepare(files, str(out), 7000)
    assert list(open_part(shards_of(out)).texts()) == list(open_part(files).texts())


def test_death_before_the_folder_is_declared_complete(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:

        def replace_file(path, content):
            if json.loads(content)["complete"]:
                raise Killed
            path.write_bytes(content)

        patched.setattr(module, "replace_file", replace_file)
        with pytest.raises(Killed):
            prepare(files, str(out))
    shards = set(out.glob("*.array_record"))
    prepare(files, str(out))
    assert set(out.glob("*.array_record")) == shards
    assert list(open_part(shards_of(out)).texts()) == list(open_part(files).texts())


def test_complete_folder_is_not_changed(files, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(files, str(out), 7000)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != ".lock"}
    assert prepare(files, str(out), 7000) == manifest
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_refusals(files, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(files, str(other))
    assert os.listdir(other) == ["thesis.doc"]
    out = tmp_path / "out"
    prepare(files, str(out), 7000)
    with pytest.raises(ConfigError, match="begun with other shard_bytes"):
        prepare(files, str(out), 8000)
    with pytest.raises(ConfigError, match="begun with other inputs"):
        prepare(files[:1], str(out), 7000)
    with pytest.raises(ConfigError, match="is a shard already"):
        prepare(shards_of(out), str(tmp_path / "again"))
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="hold no text"):
        prepare(files[1:], str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="shard_bytes=0"):
        prepare(files, str(out), 0)
    with pytest.raises(ConfigError, match="files is empty"):
        prepare((), str(out))


def test_two_processes_do_not_write_one_folder(files, tmp_path, monkeypatch):
    read = module.read_chunks

    def reader(path):
        with pytest.raises(ConfigError, match="by another process"):
            prepare(files, str(tmp_path / "out"))
        yield from read(path)

    monkeypatch.setattr(module, "read_chunks", reader)
    prepare(files, str(tmp_path / "out"))


def test_foreign_shards_have_a_document_a_record(tmp_path):
    texts = [f"record {i}".encode() * (i % 5) for i in range(2500)]
    path = tmp_path / "foreign.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text)
    writer.close()
    assert list(open_part((str(path),)).texts()) == [t for t in texts if t]


def test_damaged_shards(files, tmp_path):
    out = tmp_path / "out"
    prepare(files, str(out))
    shard, index = out / "shard-00000.array_record", out / "shard-00000.index.npz"
    content = index.read_bytes()
    index.write_bytes(content[:50])
    with pytest.raises(ConfigError, match="is damaged"):
        open_part(shards_of(out))
    np.savez(index, lengths_D=np.array([1, 2]), record_bytes=RECORD_BYTES, fingerprint="")
    with pytest.raises(ConfigError, match="records but its index says 2"):
        open_part(shards_of(out))
    index.write_bytes(content)
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged") as e:
        list(open_part(shards_of(out)).texts())
    assert "\n" not in str(e.value)
    shard.write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        open_part(shards_of(out))


def test_command_line(files, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["prepare", "--data.files", *files, "--out", out])
    main(["describe", "--data.files", f"{out}/*.array_record", "--data.seq-len", "64"])
    shown = capsys.readouterr().out
    main(["describe", "--files", f"{out}/*.array_record", "--seq_len", "64"])
    assert capsys.readouterr().out in shown
    assert "35 documents" in shown
    assert "fingerprint" in shown and "held out" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prepare", "--files", "none*", "--out", "out"], "error: files: 'none*' matches no file"),
        (["describe", "--data.files", "none*"], "error: data.files: 'none*' matches no file"),
        (["describe", "--data.batch-size", "0"], "error: data.batch_size=0: use 1 or more"),
        (["describe", "--data.flies", "x"], "error: unknown field flies: did you mean files?"),
        (["descibe"], "error: 'descibe' is no command: use prepare or describe"),
        ([], "error: '' is no command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert exit_code(lambda: main(args))[0] == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert os.listdir(tmp_path) == []
