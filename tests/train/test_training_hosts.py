"""Two emulated hosts with two devices each train the same run as one host with four."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hnet.data import open_corpus
from hnet.fields import to_json
from tests.training import rows, run, tiny_run
from tpu.emulate import Emulation

ROOT = Path(__file__).parents[2]
BOUND = 200  # seconds, far more than the emulated run takes on an idle machine


def assert_same_run(table, expected):
    """Data are equal bit by bit, numbers up to the order of sums."""
    assert [row.keys() for row in table] == [row.keys() for row in expected]
    for row, wanted in zip(table, expected):
        for name, value in wanted.items():
            if isinstance(value, float):
                np.testing.assert_allclose(row[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
            else:
                assert row[name] == value, name


@pytest.mark.every
def test_two_hosts_train_the_run_of_one_which_goes_on_with_it(tmp_path):
    config = tiny_run(tmp_path / "one")
    files = ("synthetic:latin", "synthetic:greek:3000")
    config = replace(config, data=replace(config.data, files=files, weights=(0.7, 0.3)))
    run(config, devices=jax.devices()[:4])
    whole = rows(config)

    hosts_config = replace(config, workdir=str(tmp_path / "two"))
    file = tmp_path / "two.json"
    file.write_text(json.dumps(to_json(hosts_config)))
    command = [sys.executable, "-m", "experiments.pretrain", str(file)]
    env = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # On a busy machine processes can lose contact; the same command then resumes, as for a user.
    for _ in range(2):
        with Emulation(command, hosts=2, devices=2, env=env) as hosts:
            codes = hosts.wait(BOUND)
        if codes == [0, 0]:
            break
    assert codes == [0, 0], "\n".join(line for own in hosts.lines for line in own[-30:])
    assert_same_run(rows(hosts_config), whole)
    scored = [sum(v for k, v in row.items() if k.startswith("bytes_seen/")) for row in whole]
    assert scored == [row["bytes_seen"] for row in whole]
    names = open_corpus(config.data).train.source_names
    assert all(whole[-1][f"bytes_seen/{name}"] > 0 for name in names)

    # Another number of processes resumes from the checkpoint of two at step 4.
    (tmp_path / "two" / "checkpoints" / "8" / "manifest.json").unlink()
    run(hosts_config, devices=jax.devices()[:4])
    assert_same_run(rows(hosts_config), whole)
