"""Reading parallel text."""

import gzip
import os
import threading

import numpy as np
import pytest

from hnet.data.parallel import bytes_by_script, read_lines, read_parallel
from hnet.data.scripts import SCRIPTS
from hnet.errors import ConfigError
from tests.data_helpers import jsonl


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n \nthree\nfour")
    (tmp_path / "b.txt").write_text("раз\nдва\n\nчетыре\n")
    (tmp_path / "c.jsonl").write_bytes(jsonl(["eins", "zwei", "drei", "vier"]))
    (tmp_path / "short.txt").write_text("only")
    return tmp_path


def test_lines_that_a_language_lacks_are_left_out_of_all(files):
    lines = read_parallel([f"a={files}/a.txt", f"b={files}/b.txt", f"c={files}/c.jsonl"])
    assert lines == {
        "a": [b"one", b"four"],
        "b": ["раз".encode(), "четыре".encode()],
        "c": [b"eins", b"vier"],
    }


def test_comparable_text_keeps_all_its_lines(files):
    lines = read_parallel([f"a={files}/a.txt", f"s={files}/short.txt"], aligned=False)
    assert lines == {"a": [b"one", b"three", b"four"], "s": [b"only"]}


def test_a_language_goes_on_with_another_file(files):
    lines = read_parallel([f"c={files}/{name}" for name in ("c.jsonl", "short.txt")])
    assert lines["c"] == [b"eins", b"zwei", b"drei", b"vier", b"only"]


def test_lines_of_every_form(files):
    contents = {
        "bom.txt": b"\xef\xbb\xbfone\r\n\r\nthree\xe2\x80\xa8and a half\r\nfour\r\n",
        "bom.JSONL": b"\xef\xbb\xbf" + jsonl(["one", "", "three\u2028and a half", "four"]),
        "blank.jsonl": jsonl(["one"]) + b"\n" + jsonl(["three\u2028and a half", "four"]),
        "part-0": '{"text": "one"}\n\n{"text": "three\u2028and a half"}\n{"text": "four"}'.encode(),
        "packed.txt.gz": gzip.compress("one\n\nthree\u2028and a half\nfour\n".encode()),
    }
    expected = [b"one", "three\u2028and a half".encode(), b"four"]
    for name, content in contents.items():
        (files / name).write_bytes(content)
        lines = read_parallel([f"a={files}/a.txt", f"x={files}/{name}"])
        assert lines["a"] == [b"one", b"three", b"four"]
        assert lines["x"] == expected, name


def test_lines_are_as_stored_and_packed_text_is_unpacked(files):
    text = b"\xef\xbb\xbf one\rtwo \r\n\nx\x0by\xe2\x80\xa8z\n"
    expected = [b" one\rtwo ", b"", b"x\x0by\xe2\x80\xa8z"]
    (files / "x.txt").write_bytes(text)
    (files / "x.GZ").write_bytes(gzip.compress(text))
    (files / "zip").write_bytes(b"PK\x03\x04")
    for name in ("x.txt", "x.GZ"):
        assert read_lines(str(files / name), "file") == expected
    assert read_lines(str(files / "c.jsonl"), "file")[0] == b"eins"
    with pytest.raises(ConfigError, match="zip' is a zip archive"):
        read_lines(str(files / "zip"), "file")
    os.mkfifo(files / "pipe")
    writer = threading.Thread(target=(files / "pipe").write_bytes, args=(text,))
    writer.start()
    assert read_lines(str(files / "pipe"), "file") == expected
    writer.join()
    with pytest.raises(ConfigError, match="file: '/dev/zero': it is a device"):
        read_lines("/dev/zero", "file")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["a.txt"], "files='a.txt': write LANGUAGE=FILE"),
        (["a=nowhere.txt"], "files: 'nowhere.txt': No such file"),
        (["a={}/a.txt", "s={}/short.txt"], "numbers of lines differ .*'a': 4, 's': 1"),
        (["a={}/bad.jsonl"], 'not every line is an object with "text" .line 1: has no string'),
        (["a={}/deep.jsonl"], "line 1: it is nested too deeply"),
        (["a={}/bad.gz"], "Not a gzipped file"),
        (["a={}/cut.gz"], "end-of-stream marker"),
        (["a={}/zip"], "is a zip archive"),
        ([], "give LANGUAGE=FILE"),
    ],
)
def test_bad_files_are_one_line(files, entries, says):
    (files / "bad.jsonl").write_text('{"text": 3}\n')
    (files / "deep.jsonl").write_text("[" * 100_000)
    (files / "bad.gz").write_text("text")
    (files / "cut.gz").write_bytes(gzip.compress(b"text " * 99)[:-9])
    (files / "zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match=says) as error:
        read_parallel([entry.format(files) for entry in entries])
    assert "\n" not in str(error.value)


def test_bytes_count_by_script():
    counts = bytes_by_script([b"1ab", "яя".encode()])
    assert counts.dtype == np.int64
    found = {SCRIPTS[i]: int(n) for i, n in enumerate(counts) if n}
    assert found == {"Common": 1, "Latin": 3, "Cyrillic": 3}  # a character's last byte decides
