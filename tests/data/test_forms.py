"""The form of a file follows from content and suffix; files that are not text are refused."""

import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hnet.data.forms import form_of
from hnet.data.sources import open_source
from hnet.errors import ConfigError
from tests.data_helpers import jsonl

TEXT = "plain text, Größe\n".encode() * 40
LINES = jsonl(["one", "zwei", "три"])
BOM = b"\xef\xbb\xbf"


def documents(folder, name, content):
    (folder / name).write_bytes(content)
    source = open_source(str(folder / name))
    ends = source.lengths_D.cumsum()
    return [source.store.read(e - n, e).tobytes() for e, n in zip(ends, source.lengths_D)]


def named(value):
    """Ids without content, which holds the time of day in archives."""
    return "content" if isinstance(value, bytes) else value


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("OK.JSONL", LINES),
        ("ok.Jsonl.GZ", gzip.compress(LINES)),
        ("ok.ndjson", LINES),
        ("ok.json", LINES),
        ("part-00000", LINES),
        ("part-00000", gzip.compress(LINES)),
        ("dump.log", b"\n \n" + LINES),
        ("windows.jsonl", BOM + LINES.replace(b"\n", b"\r\n")),
        ("windows", BOM + LINES),
    ],
    ids=named,
)
def test_json_lines(tmp_path, name, content):
    assert documents(tmp_path, name, content) == [b"one", b"zwei", "три".encode()]


def test_a_first_line_that_is_longer_than_what_is_looked_at(tmp_path):
    text = "x" * 100_000
    assert documents(tmp_path, "part", jsonl([text, "y"])) == [text.encode(), b"y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", TEXT),
        ("A.TXT.GZ", gzip.compress(TEXT)),
        ("a.txt", gzip.compress(TEXT)),  # told by its content
        ("a", gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:])),
        ("a.xml", b"<?xml?>" + TEXT),
        ("a.txt", LINES),  # called plain text
        ("a.json", json.dumps({"title": "a", "body": "text"}, indent=1).encode()),
        ("a.py", b'{"text": 3}\n'),
        ("latin1", "Größe und Maß\n".encode("latin-1") * 40),
        ("koi8.txt", "слова и числа\n".encode("koi8-r") * 40),
        ("colours.log", b"\x1b[31mred\x1b[0m and plain words\n" * 40),
        ("model.bin", bytes(range(256)) * 40),
        ("zip.bin", b"PK\x03\x04" + bytes(400)),
        ("BZh.txt", b"BZhavan is a name" * 40),
    ],
    ids=named,
)
def test_text_as_it_is_stored(tmp_path, name, content):
    unpacked = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    assert documents(tmp_path, name, content) == [unpacked]


def test_parquet_of_any_name(tmp_path):
    for name in ("a.parquet", "a.PARQUET", "part-0"):
        pq.write_table(pa.table({"text": ["one", "", "zwei"]}), tmp_path / name)
        assert documents(tmp_path, name, (tmp_path / name).read_bytes()) == [b"one", b"zwei"]


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("book.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("book.txt", TEXT)
    return file.getvalue()


def parquet():
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["one"]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("books.tar.gz", gzip.compress(tar()), "a tar archive"),
        ("books.gz", gzip.compress(tar()), "a tar archive"),
        ("books", tar(), "a tar archive"),
        ("books.TGZ", gzip.compress(b""), "packed in a way not read here"),
        ("books.tar.gz", gzip.compress(TEXT), "packed in a way not read here"),
        ("a.txt", zipped(), "a zip archive"),
        ("a.txt", lzma.compress(b"text", format=lzma.FORMAT_ALONE), "packed with lzma"),
        ("a.txt", pickle.dumps(["text"]), "a pickle"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0", "an image"),
        ("a.txt", b"\x93NUMPY\x01\0", "a NumPy array"),
        ("a.txt.gz", gzip.compress(zipped()), "a zip archive"),
        ("a.ZIP", b"", "packed in a way not read here"),
        ("a.txt", b"BZh91AY&SY" + os.urandom(40), "bzip2"),
        ("a.txt", b"\xfd7zXZ\x00" + bytes(40), "xz"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(40), "zstd"),
        ("a.txt.gz", gzip.compress(gzip.compress(TEXT)), "gzip a second time"),
        ("a.parquet.gz", gzip.compress(parquet()), "Parquet packed with gzip"),
        ("a.gz", gzip.compress(parquet()), "Parquet packed with gzip"),
        ("a.txt", TEXT.decode().encode("utf-16"), "UTF-16"),
        ("a.txt", TEXT.decode().encode("utf-16-le"), "control characters"),
        ("a.txt", bytes(i * i % 251 for i in range(3000)), "control characters"),
        ("a.txt.gz", gzip.compress(bytes(3000)), "control characters"),
        (
            "a.json",
            json.dumps([{"text": "one"}, {"text": "two"}]).encode(),
            "JSON without an object",
        ),
        ("a.json", json.dumps([{"text": "one"}], indent=1).encode(), "JSON without an object"),
        ("a.json", json.dumps({"text": "one"}, indent=1).encode(), "JSON without an object"),
        ("a.json", json.dumps({"rows": [{"text": "one"}]}).encode(), "JSON without an object"),
        ("books.gz", gzip.compress(b"book.txt" + bytes(40) + TEXT * 9), "value 0"),
        ("a.arrow", b"\xff\xff\xff\xff\x78\0\0\0" + TEXT * 9, "value 0"),
        ("a.tfrecord", len(TEXT).to_bytes(8, "little") + b"\xc0\xff\xee\xc0" + TEXT, "value 0"),
        ("short.txt", "short".encode("utf-16-le"), "value 0"),
        ("a.avro", b"Obj\x01\x04\x14avro.codec" + TEXT, "Avro"),
        ("a.warc.gz", gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n" + TEXT), "WARC"),
        ("a.deb", b"!<arch>\ndebian-binary   1" + TEXT, "ar archive"),
        ("a.rtf", b"{\\rtf1\\ansi " + TEXT, "RTF"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.txt.gz", TEXT, "cannot be read"),
    ],
    ids=named,
)
def test_what_is_not_text_of_a_known_form(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as e:
        open_source(str(tmp_path / name))
    assert "\n" not in str(e.value) and name in str(e.value)


def test_shards_by_a_suffix_of_any_case(tmp_path):
    (tmp_path / "A.ARRAY_RECORD").write_bytes(b"short")
    with pytest.raises(ConfigError, match="shard .* is damaged"):
        open_source(f"{tmp_path}/*")


def test_a_pipe_is_not_called_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no regular file"):
        open_source(f"{tmp_path}/*")
    with pytest.raises(ConfigError, match="matches no file|cannot be a path"):
        open_source("a\x00b")
    assert form_of(__file__) == ("text", False)
