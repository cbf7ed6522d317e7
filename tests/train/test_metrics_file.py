"""metrics.jsonl: what is kept when a run resumes, the file is damaged, or the disk is full."""

import errno
import json

import pytest

from hnet.errors import Failed
from hnet.train import metrics_file
from hnet.train.metrics_file import MetricsFile, read_metrics

ROWS = [{"step": step} for step in (1, 2, 3)]


@pytest.fixture
def file(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for row in ROWS:
        file.write(row)
    return file


def test_metrics_of_a_resumed_run_end_where_it_goes_on(file, tmp_path):
    with file.path.open("a") as f:
        f.write('{"step": 2}')  # incomplete: its end is missing
    assert read_metrics(tmp_path) == [*ROWS, {"step": 2}]
    file = MetricsFile(tmp_path, 2, pytest.fail)
    assert read_metrics(tmp_path) == ROWS[:2]
    file.amend(1, {"eval/bpb": 9.0})
    assert read_metrics(tmp_path) == ROWS[:2]
    file.amend(2, {"eval/bpb": 3.0})
    file.write({"step": 3})
    assert read_metrics(tmp_path) == [ROWS[0], {"step": 2, "eval/bpb": 3.0}, ROWS[2]]
    file.go_back(1)
    file.write({"step": 2})
    assert read_metrics(tmp_path) == ROWS[:2]


def test_what_an_earlier_version_wrote_as_nan_becomes_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": NaN, "b": [Infinity, 2]}\n')
    expected = [{"step": 1, "a": None, "b": [None, 2]}]
    assert read_metrics(tmp_path) == expected
    MetricsFile(tmp_path, 1, pytest.fail)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == expected[0]


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe{", b"[" * 100_000, b"3", b'{"step": "2"}', b'{"step": 2', b"\0" * 50, b""],
    ids=["no UTF-8", "deep", "number", "text", "cut off", "zeros", "empty"],
)
def test_damaged_lines_are_left_out_and_kept_elsewhere(tmp_path, damage):
    path, said = tmp_path / "metrics.jsonl", []
    content = b'{"step": 1}\n' + damage + b'\n{"step": 2}\n'
    path.write_bytes(content)
    assert read_metrics(tmp_path) == ROWS[:2]
    MetricsFile(tmp_path, 2, said.append).write({"step": 3})
    assert read_metrics(tmp_path) == ROWS
    assert (tmp_path / "metrics.jsonl.aside-1").read_bytes() == content
    assert len(said) == 1 and "1 damaged line is left out, metrics.jsonl.aside-1 has it" in said[0]


def test_a_folder_in_its_place_is_set_aside(tmp_path):
    (tmp_path / "metrics.jsonl" / "mine").mkdir(parents=True)
    (tmp_path / "metrics.jsonl.aside-1").touch()
    assert read_metrics(tmp_path) == []
    said = []
    MetricsFile(tmp_path, 2, said.append).write({"step": 3})
    assert read_metrics(tmp_path) == ROWS[2:] and len(said) == 1
    assert (tmp_path / "metrics.jsonl.aside-2" / "mine").is_dir()


def test_rows_wait_while_the_disk_is_full(file, tmp_path, monkeypatch):
    said, file._say = [], lambda text: said.append(text)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_file.os, "open", full)
        for step in (4, 5):
            file.write({"step": step})
        assert read_metrics(tmp_path) == ROWS
    with file.path.open("ab") as f:
        f.write(b'{"st')  # until the disk was full
    file.write({"step": 6})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert file.path.read_bytes().count(b"\n") == 6
    assert [("No space left" in text, "written again" in text) for text in said] == [
        (True, False),
        (False, True),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(metrics_file.os, "open", full)
        file.write({"step": 7})
        file.close()
    assert "1 row is lost" in said[-1]


def test_a_file_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match="cannot be written .Not a directory") as e:
        MetricsFile(tmp_path / "file" / "run", 0)
    assert "\n" not in str(e.value)
