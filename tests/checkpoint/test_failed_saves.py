"""A save that fails or cannot be right is one error."""

import errno
import logging
import os
import sys
from concurrent.futures import wait

import jax.numpy as jnp
import pytest

from hnet.checkpoint import manifest
from hnet.checkpoint.quiet import quiet_orbax
from hnet.checkpoint.save import Checkpointer, CheckpointError
from hnet.train.config import CheckpointConfig
from tests.checkpoint.states import make_state


def no_space(*args):
    raise OSError(28, "No space left on device")


def test_background_error_surfaces_at_the_next_check(two, monkeypatch):
    with Checkpointer(two) as checkpoints:
        monkeypatch.setattr(manifest, "write", no_space)
        checkpoints.save(3, make_state(), {})
        wait([checkpoints._saving])
        with pytest.raises(CheckpointError, match="step 3 could not be saved: OSError.*No space"):
            checkpoints.check()
        checkpoints.check()  # the error is raised only once
        checkpoints.save(4, make_state(), {})
        with pytest.raises(CheckpointError, match="step 4"):
            checkpoints.save(5, make_state(), {})
        monkeypatch.undo()
        assert checkpoints.latest_good_step() == 2
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        assert checkpoints.latest_good_step() == 3


def test_synchronous_save_raises_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", no_space)
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpoints:
        with pytest.raises(CheckpointError, match="No space"):
            checkpoints.save(1, make_state(), {})


def test_extras_that_json_would_change_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, make_state(), {"loss": float("nan")})


def test_paths_that_collide_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, {})


def test_a_failed_save_is_one_error_even_if_orbax_raises_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    checkpoints = Checkpointer(tmp_path)
    close = checkpoints._orbax.close
    monkeypatch.setattr(checkpoints._orbax, "close", lambda: (close(), full()))
    with pytest.raises(CheckpointError, match="step 3 could not be saved: .*No space left"):
        with checkpoints:
            checkpoints.save(3, {"w": jnp.arange(7.0)}, {})
            checkpoints.wait()
    checkpoints._quiet.close()  # as the process would end here


def test_what_orbax_and_tensorstore_print_about_a_failed_save_is_left_out(monkeypatch, caplog):
    told, absl = [], logging.getLogger("absl")
    monkeypatch.setattr(sys, "excepthook", lambda *fault: told.append(fault[1]))

    def record(path, level):
        return absl.makeRecord("absl", level, f"x{os.sep}{path}{os.sep}y.py", 1, "", (), None)

    with quiet_orbax():
        for text in ("Event loop is closed", "other"):
            sys.excepthook(RuntimeError, RuntimeError(text), None)
        kept = [
            bool(absl.filter(record(path, level)))
            for path in ("orbax", "jax")
            for level in (logging.WARNING, logging.ERROR)
        ]
    assert [str(fault) for fault in told] == ["other"] and kept == [True, False, True, True]
    assert absl.filter(record("orbax", logging.ERROR))
