"""Commands as people start them: names, bad input, kill, resume, requeue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.command_line import base_config, named_configs, run_config
from hnet.config import ConfigError
from hnet.model import abstract
from hnet.train.distributed import REQUEUE_EXIT_CODE
from tests.training import rows, tiny_run

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", sorted(named_configs()))
def test_every_named_configuration_builds_and_says_how_to_run_it(name):
    config = base_config(name)
    graph, params = abstract(config.model)
    assert params and config.workdir
    module = sys.modules[f"experiments.configs.{name}"]
    assert f"experiments.pretrain{'' if name == 'default' else ' ' + name}" in module.__doc__


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optim.learning_rat", "1"], r"--optim.learning_rat.*did you mean --optim.learning-rate"),
        (["nosuch"], "configuration 'nosuch' is unknown.*default"),
        (["--seed", "x"], "--seed.*'x'"),
        (["--model.stages.0.arch_layout", "q3", "m4"], "stages.0.arch_layout.*'q3'"),
        (["--model.stages.1.num_heads", "7"], "stages.1.d_model=256 is not divided by num_heads=7"),
        (["--train.steps", "0"], "train.steps=0"),
        (["missing.json"], "missing.json"),
    ],
)
def test_bad_settings_are_one_line(argv, says):
    with pytest.raises(ConfigError, match=says) as error:
        run_config(argv)
    assert "\n" not in str(error.value) and "╭" not in str(error.value)


def test_settings_override_the_named_configuration():
    config = run_config(["reference", "--optim.b2", "0.99", "--data.files", "a*.txt", "b.txt"])
    assert config.optim.b2 == 0.99 and config.optim.schedule == "cosine"
    assert config.data.files == ("a*.txt", "b.txt")


def start(workdir, *settings):
    """The trainer as a process of its own, on the tiny model."""
    config = ROOT / "tests" / "tiny.json"
    command = [sys.executable, "-m", "experiments.pretrain", str(config), "--workdir", str(workdir)]
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, *settings], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_bad_input_exits_with_2_and_one_line_on_stderr(tmp_path):
    process = start(tmp_path / "run", "--data.files", str(tmp_path / "none*.txt"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("\n") == 1 and stderr.startswith("error: data.files")
    assert not (tmp_path / "run").exists()
