"""No command overwrites, truncates or replaces a user's files; errors come before any work."""

import errno
import importlib
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from optuna.study import StudyDirection

from hnet import command_line
from hnet.errors import ConfigError
from hnet.outputs import new_file, new_files, read_file, write_new
from hnet.sweep.results import RESULTS, check_results
from hnet.sweep.storage import open_storage
from hnet.weights import tensors

MINE = b"my own file, line 1\nand a line without an end"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bad_paths(folder: Path) -> list[str]:
    (folder / "file").write_bytes(MINE)
    (folder / "dangling").symlink_to(folder / "nowhere")
    names = ["file", "file/below", "dangling", "x" * 300, ".", "a\0b"]
    return [
        *(f"{folder}/{name}" for name in names),
        "",
        "gs://bucket/a",
        "/dev/null/a",
        "/dev/full",
    ]


def test_paths_where_nothing_can_be_written_are_named_in_one_line(tmp_path):
    for path in bad_paths(tmp_path):
        before = content(tmp_path)
        for check in (new_file, lambda path, field: write_new(path, "x", field)):
            if check is not new_file and path in ("", "gs://bucket/a"):
                continue
            with pytest.raises(ConfigError, match="^out=") as e:
                check(path, "out")
            assert "\n" not in str(e.value) and len(str(e.value)) < 400
        assert content(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="out=.*file.*[Nn]o"):
        new_files(tmp_path / "file", ["a"], "out")
    with pytest.raises(ConfigError, match="file' exists"):
        new_files(tmp_path, ["a", "file"], "out")


def test_a_folder_without_write_permission_is_found_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may do anything
    with pytest.raises(ConfigError, match="cannot be written to"):
        new_file(tmp_path / "a", "out")
    assert new_file(tmp_path.parent / "other", "out") == tmp_path.parent / "other"


def test_files_are_read_or_named_in_one_line(tmp_path):
    for path in [*bad_paths(tmp_path)[1:], "/dev/zero", tmp_path]:
        with pytest.raises(ConfigError, match="^file=") as e:
            read_file(path, "file")
        assert "\n" not in str(e.value)
    assert read_file(tmp_path / "file", "file") == MINE
    read, write = os.pipe()  # as `<(command)` of a shell
    os.write(write, MINE)
    os.close(write)
    assert read_file(f"/dev/fd/{read}", "file") == MINE
    os.close(read)


def test_what_could_not_be_written_whole_is_taken_away(tmp_path, monkeypatch):
    write_new(tmp_path / "new" / "a", "text", "out")
    assert (tmp_path / "new" / "a").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError):
        write_new(tmp_path / "pipe", "text", "out")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode, buffering=0)

        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            self.file.close()

        def write(self, data):
            self.file.write(data[:3])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("hnet.outputs.open", Full, raising=False)
        with pytest.raises(ConfigError, match="No space left"):
            write_new(tmp_path / "b", "text", "out")
    assert not (tmp_path / "b").exists()


COMMANDS = [  # (options, existing file)
    ("segment", "--checkpoint w --text a --html DIR/mine", "mine"),
    ("calibrate", "--files a=b --mean-ratio 5 --out DIR/mine", "mine"),
    ("fairness", "--files a=b --out DIR", "report.md"),
    ("fairness", "--files a=b --out DIR", "chunks.svg"),
    ("benchmarks.__main__", "--json DIR/mine", "mine"),
    ("generate", "--checkpoint w --input DIR/prompts.jsonl --output DIR/mine", "mine"),
    ("sweep", "--space DIR/space.toml --out DIR", "results.csv"),
    ("sweep", "--space DIR/space.toml --out DIR", "best.json"),
    ("sweep", "--space DIR/space.toml --out DIR", "journal.log"),
    ("sweep", "--space DIR/space.toml --out DIR/new --storage DIR/mine", "mine"),
    ("scaling.__main__", "plan --out DIR", "plan.json"),
    ("scaling.__main__", "plan --out DIR", "fit.json"),
    ("scaling.__main__", "plan --out DIR", "configs/a.json"),
    ("scaling.__main__", "plan --out DIR", "tokenizer.json"),
]


@pytest.mark.parametrize(("command", "options", "mine"), COMMANDS)
def test_commands_do_not_change_a_file_of_the_user(
    tmp_path, command, options, mine, monkeypatch, capsys
):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_bytes(MINE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "space.toml").write_text('[space]\n"optim.learning_rate" = [1e-3, 2e-3]\n')
    before = content(tmp_path)
    module = importlib.import_module(f"experiments.{command}")
    monkeypatch.setattr(module, "load", None, raising=False)
    monkeypatch.setattr("sys.argv", [command, *options.replace("DIR", str(tmp_path)).split()])
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as e:
        command_line.run(module.main)
    captured = capsys.readouterr()
    assert e.value.code == 2 and captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1 and mine.split("/")[0] in captured.err
    assert content(tmp_path) == before


@pytest.mark.parametrize("mine", [MINE, b"one line", b'{"prompt": "a"}\n{"x', b"\n\n", b"[1]\n2"])
def test_a_journal_is_not_made_of_another_file(tmp_path, mine):
    (tmp_path / "mine").write_bytes(mine)
    with pytest.raises(ConfigError, match="no journal of a sweep"):
        open_storage(str(tmp_path / "mine"))
    assert content(tmp_path) == {"mine": mine}


def test_a_journal_is_opened_again(tmp_path):
    path = tmp_path / "new" / "journal.log"
    for number in range(2):
        open_storage(str(path)).create_new_study([StudyDirection.MINIMIZE], f"study {number}")
    with open(path, "ab") as file:
        file.write(b'{"op_c')  # left by a killed worker
    assert len(open_storage(str(path)).get_all_studies()) == 2


def test_results_of_a_sweep_are_replaced_and_no_others(tmp_path):
    check_results(tmp_path / "new")
    (tmp_path / "results.csv").write_text("point,state,seed\n")
    (tmp_path / "best.json").write_text("{}")
    check_results(tmp_path, "of an earlier version")
    (tmp_path / "results.csv").write_text("point,state,fault,study\n0,done,,a\n")
    check_results(tmp_path, "a")
    with pytest.raises(ConfigError, match="has the results of study 'a', not of 'b'"):
        check_results(tmp_path, "b")
    (tmp_path / "results.csv").unlink()
    with pytest.raises(ConfigError, match="no sweep wrote its best.json"):
        check_results(tmp_path)
    assert "best.json" in RESULTS


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_weights_that_appear_meanwhile_are_not_replaced(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"

    def write(partial, arrays):
        path.write_bytes(MINE)
        partial.write_bytes(b"weights")

    monkeypatch.setattr(tensors, "_write", write)
    with pytest.raises(ConfigError, match="File exists"):
        tensors.write_tensors(path, {"a": np.zeros(2, np.float32)})
    assert content(tmp_path) == {path.name: MINE}


def test_a_page_names_no_folder_of_the_sender(tmp_path, monkeypatch):
    from hnet.commands.segment import SegmentConfig, _write_page

    config = SegmentConfig(str(tmp_path / "secret" / "run"), html=str(tmp_path / "page.html"))
    _write_page(config, [])
    page = (tmp_path / "page.html").read_text()
    assert "secret" not in page and str(tmp_path) not in page and "run" in page
    assert json.dumps(str(tmp_path)) not in page


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_one_line_in_every_command(number, capsys):
    def main():
        raise OSError(number, os.strerror(number), "out/a\nb")

    assert command_line.exit_code(main)[0] == command_line.FAILED
    assert capsys.readouterr().err == (
        f"error: out/a b cannot be written ({os.strerror(number)}): free some room or use another "
        "disk\n"
    )


def test_a_full_disk_is_one_line_also_without_a_name(capsys):
    def main():
        with open("/dev/full", "w") as file:
            file.write("x")

    assert command_line.exit_code(main)[0] == command_line.FAILED
    assert capsys.readouterr().err.startswith("error: a file cannot be written (No space left on ")
