"""Content from outside: files, pipes and JSON."""

import json
import math
import os
import re
import threading
from pathlib import Path

import pytest

from hnet import files
from hnet.errors import ConfigError
from hnet.files import json_text, parse_json, read_json


def test_files_are_refused_in_one_line(tmp_path):
    for name, content, says in (
        ("missing.json", None, "No such file"),
        ("deep.json", 100_000 * "[" + 100_000 * "]", "nested too deep"),
        ("broken.json", "{", "is not JSON"),
        ("binary.json", "\x00\xff", "is not JSON"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=f"menu '.*{name}'.*{says}"):
            read_json(tmp_path / name, "menu")
    with pytest.raises(ConfigError, match="directory"):
        read_json(tmp_path)


def test_json_nested_too_deep_is_an_error_like_any_other(tmp_path):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="Expecting value"):
        parse_json("x")


def test_json_from_outside_is_read_by_one_function():
    """`json.loads` raises RecursionError for deep nesting, which no reader expects."""
    own = {  # what this program has just written, and the reader that keeps every byte
        "hnet/files.py", "hnet/runtime/distributed.py", "hnet/sweep/study.py", "tpu/aot.py",
        "hnet/checkpoint/manifest.py", "hnet/data/json_lines.py",
        "hnet/data/tokens.py", "hnet/data/pythondocs.py", "hnet/data/tokenizers/superbpe.py",
    }  # fmt: skip
    root = Path(files.__file__).parents[1]
    paths = [p for folder in ("hnet", "experiments", "tpu") for p in (root / folder).rglob("*.py")]
    found = {str(p.relative_to(root)) for p in paths if re.search(r"json\.loads?\(", p.read_text())}
    assert len(paths) > 100 and found == own


def test_results_are_json_for_every_reader():
    content = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan, "d": "NaN"}}
    found = json.loads(json_text(content, indent=1), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN"}}
    assert json_text({"a": 1.5}) == '{"a": 1.5}'
    root = Path(__file__).parents[1]
    commands = [*(root / "experiments").rglob("*.py"), *(root / "hnet/commands").glob("*.py")]
    assert len(commands) > 50
    for file in commands:  # numbers that are printed or written may not be finite
        assert not re.search(r"(print|write\w*|replace_file)\(.*json\.dumps", file.read_text()), (
            file
        )


def test_a_pipe_is_read_if_something_writes_to_it(tmp_path, monkeypatch):
    os.mkfifo(path := tmp_path / "pipe.json")
    writer = threading.Thread(target=lambda: path.write_text("[3]"))
    writer.start()
    assert read_json(path) == [3]
    writer.join()
    monkeypatch.setattr(files, "_PIPE_SECONDS", 0.01)
    with pytest.raises(ConfigError, match="a pipe that nothing writes to"):
        read_json(path)
