"""Commands as users start them: names, bad input, kill, resume, requeue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from hnet.checkpoint.step_folders import list_steps
from hnet.fields import to_json
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from tests.quick import QUICK_FLAGS
from tests.training import rows, tiny_run

ROOT = Path(__file__).parents[2]


def start(folder: Path, *settings: str) -> subprocess.Popen:
    """The trainer in a separate process, on one device, with the tiny run as a JSON file."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(to_json(tiny_run(folder / "run"))))
    env = os.environ | {"XLA_FLAGS": QUICK_FLAGS, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", str(file), *settings],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_bad_input_exits_with_2_and_one_line_on_stderr(tmp_path):
    process = start(tmp_path, "--data.files", str(tmp_path / "none*.txt"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("\n") == 1 and stderr.startswith("error: data.files")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [1, 1_000_000])
def test_output_without_a_reader_ends_without_a_word(length):
    """Output that stays in the buffer until the end, and output that does not."""
    code = f"from hnet.command_line import run; run(lambda: print({length} * 'x'))"
    how = {"cwd": ROOT, "text": True, "env": os.environ | {"PYTHONUNBUFFERED": ""}}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), process.communicate(timeout=10)


def test_a_killed_run_goes_on_and_a_terminated_one_says_so(tmp_path):
    """kill -9 costs the steps since the last checkpoint; SIGTERM costs none and exits with 75."""
    long = ("--train.steps", "100000", "--eval.every", "100000")
    checkpoints = tmp_path / "run" / "checkpoints"
    process = start(tmp_path, *long)
    wait_for(lambda: (checkpoints / "8" / "manifest.json").exists(), process)
    process.kill()
    process.communicate(timeout=60)

    process = start(tmp_path, *long)
    wait_for(lambda: len(list_steps(epath.Path(checkpoints))) and newest(checkpoints) > 16, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE, stderr
    assert "resuming at step" in stdout
    table = rows(tiny_run(tmp_path / "run"))
    assert [row["step"] for row in table] == list(range(1, len(table) + 1))
    assert newest(checkpoints) == len(table)
    assert len({row["batch"] for row in table[:30]}) == len(table[:30])


def newest(checkpoints: Path) -> int:
    return max(list_steps(epath.Path(checkpoints)))
