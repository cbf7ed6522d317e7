"""What counts as a document, and the one-line error for everything that cannot be read."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hnet.data.files import expand, read_chunks
from hnet.errors import ConfigError
from tests.data_helpers import jsonl

RAW = b"caf\xc3\xa9 \xff\xfe\x00 raw\r\n"  # not UTF-8, with a zero byte


def documents(path):
    """The documents of a file, each joined from its chunks."""
    found, text = [], b""
    for chunk in read_chunks(str(path)):
        text += chunk.text
        if chunk.ends:
            found.append(text)
            text = b""
    assert not text
    return found


def test_text_is_one_raw_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(RAW)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(RAW))
    (tmp_path / "genome").write_bytes(RAW)
    for name in ("a.txt", "a.txt.gz", "genome"):
        assert documents(tmp_path / name) == [RAW]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    odd = b'\n  \n{"text": "raw \xff byte", "id": 3}\n{"text": "lone \\ud800"}'
    path.write_bytes(jsonl(["one", "Ünï\n中", ""]) + odd)
    expected = [b"one", "Ünï\n中".encode(), b"", b"raw \xff byte", b"lone \xed\xa0\x80"]
    assert documents(path) == expected
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert documents(packed) == expected


def test_consumed_bytes_grow_to_the_size_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["x" * 5000] * 20))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, tmp_path / "b.jsonl.gz"):
        consumed = [chunk.consumed for chunk in read_chunks(str(file))]
        assert consumed == sorted(consumed)
        assert consumed[-1] == file.stat().st_size


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", "zwei ü"]}), path)
    assert documents(path) == [b"one", "zwei ü".encode()]
    pq.write_table(pa.table({"text": [RAW]}), path)
    assert documents(path) == [RAW]


def test_expand(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.removeprefix(f"{tmp_path}/") for p in expand(f"{tmp_path}/**/*.txt")]
    assert names == ["a.txt", "b.txt", "sub/c.txt"]
    with pytest.raises(ConfigError, match="matches no file"):
        expand(f"{tmp_path}/*.jsonl")
    with pytest.raises(ConfigError, match="names a folder"):
        expand(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', r'a\.jsonl:3 has no string "text"'),
        ("a.jsonl", b'{"text": 7}', r'a\.jsonl:1 has no string "text"'),
        ("a.jsonl", b'"text"', r'a\.jsonl:1 has no string "text"'),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(RAW * 99, mtime=0)[:-9], "cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:30] + b"damage",
            "cannot be read",
        ),
        ("a.parquet", b"not parquet", "not readable Parquet"),
        ("a.txt.zst", b"", "packed in a way not read"),
    ],
)
def test_unreadable(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as e:
        documents(tmp_path / name)
    assert "\n" not in str(e.value)


def test_unreadable_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(ConfigError, match='no column "text"'):
        documents(path)
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(ConfigError, match="row 2"):
        documents(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        documents(tmp_path / "gone.txt")
