"""The command `hnet`: it works from the package by itself, without this repository."""

import re
import sys
from pathlib import Path

import pytest

import hnet
from hnet import command_line
from hnet.commands import __main__ as console


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hnet", *words])
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as end:
        console.main()
    return end.value.code


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    assert called(monkeypatch, "segmnt") == 2
    assert capsys.readouterr().err == (
        "error: command 'segmnt' is unknown: use segment, generate, evaluate, convert, verify, "
        "checkpoint\n"
    )


def test_usage_says_what_each_command_does(monkeypatch, capsys):
    assert not called(monkeypatch)
    _, _, *lines, _, more = capsys.readouterr().out.splitlines()
    named = [line[:17].strip() for line in lines]
    assert ", ".join(named) == ", ".join(console.COMMANDS) and "convert, verify" in named
    assert lines[0].startswith(
        "  segment          Show the chunks of a trained model in a text, or"
    )
    assert "python -m experiments.pretrain" in more


@pytest.mark.parametrize("words", [
    ("segment", "--checkpoint", "nope", "--text", "a"),
    ("generate", "--checkpoint", "nope", "--prompt", "a"),
    ("evaluate", "--checkpoint", "nope"),
    ("convert", "nope.pt", "out.npz"),
    ("checkpoint", "verify", "nope"),
])  # fmt: skip
def test_words_reach_the_command(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "nope" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_package_imports_nothing_outside_of_it():
    for path in Path(hnet.__file__).parent.rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) (experiments|tpu|tests)\b", path.read_text(), re.M)
        assert not found, path
