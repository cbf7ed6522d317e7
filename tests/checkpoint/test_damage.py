"""Damage of a checkpoint is found and named, and an older one is used."""

import os
from pathlib import Path

import pytest

from hnet.checkpoint import manifest
from hnet.checkpoint.__main__ import main
from hnet.checkpoint.save import Checkpointer
from hnet.command_line import exit_code
from hnet.errors import ConfigError
from tests.checkpoint.states import (
    abstract,
    assert_same_bits,
    biggest_file,
    flip_bit,
    make_state,
    truncate,
)


def empty(folder: Path) -> None:
    folder.rename(folder.parent / "moved")
    folder.mkdir()


def edit_manifest(folder: Path) -> None:
    path = folder / manifest.FILE_NAME
    path.write_text(path.read_text().replace('"n": 2', '"n": 3'))


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / manifest.FILE_NAME, 100)


DAMAGE = {
    flip_bit: "1 of 6 arrays changed since the save (",
    truncate: "has 100 bytes, its manifest says",
    lambda folder: biggest_file(folder).unlink(): "is missing, its manifest says",
    empty: "manifest.json is missing",
    lambda folder: (folder / manifest.FILE_NAME).unlink(): "manifest.json is missing",
    edit_manifest: "does not match its own digest",
    cut_manifest: "manifest.json is unreadable",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_older_one_is_used(two, damage, capsys):
    damage(two / "checkpoints" / "2")
    with Checkpointer(two) as checkpoints:
        if damage is not flip_bit:  # only reading the values finds a flipped bit
            assert checkpoints.latest_good_step() == 1
        restored = checkpoints.restore(abstract(make_state()))
        assert_same_bits(restored.state, make_state(1))
        assert (restored.step, restored.extras) == (1, {"n": 1})
        (line,) = restored.rejected
        assert line.startswith("checkpoint step 2 rejected: ") and "\n" not in line
        assert DAMAGE[damage] in line
        with pytest.raises(ConfigError, match="step 2 rejected"):
            checkpoints.restore(abstract(make_state()), step=2)
    assert main(["verify", str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1: good") and lines[1].startswith("step 2: BAD: ")
    assert DAMAGE[damage] in lines[1]


def test_no_usable_checkpoint_is_an_error_not_a_fresh_start(two, capsys):
    flip_bit(two / "checkpoints" / "1")
    truncate(two / "checkpoints" / "2")
    with Checkpointer(two) as checkpoints:
        with pytest.raises(ConfigError, match="no usable checkpoint.*step 2 rejected.*step 1 rej"):
            checkpoints.restore(abstract(make_state()))
        assert checkpoints.steps() == [1, 2]
    assert main(["verify", str(two)]) == 1
    assert capsys.readouterr().out.count("BAD") == 2


def test_verify_of_bad_input_is_one_line(tmp_path, capsys):
    for words, says in (
        (["verify", str(tmp_path / "nowhere")], "has no checkpoints"),
        (["check"], "invalid choice: 'check'"),
    ):
        assert exit_code(lambda: main(words))[0] == 2  # noqa: B023
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and says in captured.err


def test_verify_reads_in_groups(two, monkeypatch, capsys):
    monkeypatch.setattr("hnet.checkpoint.verify._GROUP_BYTES", 1)
    flip_bit(two / "checkpoints" / "2")
    assert main(["verify", str(two)]) == 0
    assert "1 of 1 arrays changed since the save (" in capsys.readouterr().out
