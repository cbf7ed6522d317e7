"""Which checkpoints stay: none is removed before a newer one is good."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from hnet.checkpoint import manifest, step_folders
from hnet.checkpoint.save import Checkpointer, CheckpointError
from hnet.train.config import CheckpointConfig
from tests.checkpoint.states import abstract, assert_same_bits, save_all, truncate

ROOT = Path(__file__).parents[2]


def test_keep_and_keep_every(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep=2, keep_every=4)) as checkpoints:
        save_all(checkpoints, range(1, 8))
        assert checkpoints.steps() == [4, 6, 7]


def test_old_one_stays_until_the_new_one_verifies(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        save_all(checkpoints, [1])
        write = manifest.write

        def damaging(folder, record):
            write(folder, record)
            truncate(Path(folder))

        monkeypatch.setattr(manifest, "write", damaging)
        with pytest.raises(CheckpointError, match="Damaged"):
            save_all(checkpoints, [2])
        assert checkpoints.latest_good_step() == 1
        monkeypatch.undo()
        save_all(checkpoints, [3])
        assert checkpoints.latest_good_step() == 3
        assert 1 not in checkpoints.steps()


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        save_all(checkpoints, [1, 2])
        truncate(tmp_path / "checkpoints" / "2")
        save_all(checkpoints, [3])
        assert checkpoints.steps() == [1, 2, 3]


def test_same_step_again(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.save(1, {"w": jnp.ones(3)}, {"n": 1})
        assert not checkpoints.save(1, {"w": jnp.ones(3)}, {"n": 2})
        assert checkpoints.save(1, {"w": jnp.zeros(3)}, {"n": 3})
        checkpoints.wait()
        assert checkpoints.manifest(1).extras == {"n": 3}
    assert json.loads((folder / "1.aside-1" / manifest.FILE_NAME).read_text())["extras"] == {"n": 1}


def test_run_that_went_back_is_the_one_that_resumes(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        save_all(checkpoints, [1, 3, 4])
        save_all(checkpoints, [2])
        assert checkpoints.latest_good_step() == 2
        assert checkpoints.steps() == [1, 2]
    assert {p.name for p in (tmp_path / "checkpoints").glob("*.aside-*")} == {
        "3.aside-1",
        "4.aside-1",
    }


KILLED = """
import sys, time
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from hnet.checkpoint import manifest
from hnet.checkpoint.save import Checkpointer
workdir, where = sys.argv[1:]
state = {"w": jnp.arange(1031.0)}
checkpoints = Checkpointer(workdir)
checkpoints.save(1, state, {})
checkpoints.wait()
def hang(*args, **kwargs):
    print("saving", flush=True)
    time.sleep(60)
if where == "arrays":
    ocp.PyTreeCheckpointHandler.finalize = hang
else:
    manifest.write = hang
checkpoints.save(2, jax.tree.map(lambda x: x + 1, state), {})
checkpoints.wait()
"""


def test_kill_during_a_save_leaves_the_older_one(tmp_path):
    children = {}
    for where in ("arrays", "manifest"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / where), where]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        children[where] = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
    for where, child in children.items():
        with child:
            assert child.stdout.readline() == b"saving\n"
            child.send_signal(signal.SIGKILL)
        folder = tmp_path / where / "checkpoints"
        assert step_folders.list_steps(step_folders.checkpoint_folder(tmp_path / where)) == [1, 2]
        assert (folder / "2" / "state").exists() == (where == "manifest")
        state = {"w": jnp.arange(1031.0)}
        with Checkpointer(tmp_path / where) as checkpoints:
            assert checkpoints.steps() == [1] and checkpoints.latest_good_step() == 1
            restored = checkpoints.restore(abstract(state))
            assert restored.step == 1 and "never finished" in restored.rejected[0]
            assert_same_bits(restored.state, state)
            checkpoints.save(2, state, {})
            checkpoints.wait()
            assert checkpoints.latest_good_step() == 2
            assert not (folder / "2" / manifest.PENDING_NAME).exists()
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]  # no remains


def test_first_save_killed_is_a_new_run(tmp_path):
    (tmp_path / "checkpoints" / "7" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.latest_good_step() is None
        save_all(checkpoints, [9])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["9"]
