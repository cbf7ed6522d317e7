"""Checkpoints: restore on any mesh, find and name damage, lose no checkpoint."""

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hnet.checkpoint import leaves, manifest, step_folders
from hnet.checkpoint.__main__ import main
from hnet.checkpoint.quiet import quiet_orbax
from hnet.checkpoint.save import Checkpointer, CheckpointError
from hnet.command_line import exit_code
from hnet.errors import ConfigError
from hnet.train.config import CheckpointConfig

ROOT = Path(__file__).parents[2]


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array


def mesh_of(shape, names):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


MESH = mesh_of((4, 2), ("data", "fsdp"))


def make_state(seed=0):
    """A state of incompressible values, so that the files contain their bytes unchanged."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(8, 1031)).astype(np.float32)
    b = jnp.asarray(rng.normal(size=7), jnp.bfloat16)
    return State(
        step=jnp.int32(5),
        params={
            "w": jax.device_put(w, NamedSharding(MESH, P("fsdp"))),
            "b": jax.device_put(b, NamedSharding(MESH, P())),
            "none": jnp.zeros((0, 3)),
        },
        opt_state=(jax.device_put(w * 2, NamedSharding(MESH, P(("data", "fsdp")))), ()),
        rng=jax.random.key(seed),
    )


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        x, y = np.asarray(leaves.raw(x)), np.asarray(leaves.raw(y))
        assert x.shape == y.shape and x.tobytes() == y.tobytes()


EXTRAS = {"position": 48, "bytes": 1.5e18, "config": {"layout": ["m4", ["T2"], "m4"]}, "s": "é"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with one checkpoint of `make_state()` from the (4, 2) mesh."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(5, make_state(), EXTRAS)
    return workdir


@pytest.fixture
def two(tmp_path):
    """A work directory with steps 1 and 2."""
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"n": step})
    return tmp_path


# --- save and restore


@pytest.mark.parametrize(
    "mesh, spec",
    [
        (mesh_of((1,), ("x",)), P()),
        (mesh_of((2,), ("rows",)), P("rows")),
        (mesh_of((2, 2), ("fsdp", "tensor")), P(("tensor", "fsdp"))),
        (mesh_of((8,), ("data",)), P("data")),
    ],
)
def test_restore_onto_another_mesh(saved, mesh, spec):
    state = make_state()
    everywhere = NamedSharding(mesh, P())
    wanted = abstract(state, everywhere)
    rows = NamedSharding(mesh, spec)
    wanted.params["w"] = abstract(state.params["w"], rows)
    with Checkpointer(saved) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert_same_bits(restored.state, state)
    assert restored.state.params["w"].sharding == rows
    assert restored.state.params["b"].sharding == everywhere
    assert (restored.step, restored.extras, restored.rejected) == (5, EXTRAS, [])


def test_restored_key_draws_the_same(saved):
    state = make_state()
    with Checkpointer(saved) as checkpoints:
        rng = checkpoints.restore(abstract(state.rng), only="rng").state
    assert jax.random.bits(rng) == jax.random.bits(state.rng)


def test_restore_of_a_subtree_needs_no_more_than_it(saved):
    params = make_state().params
    with Checkpointer(saved) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(params), only="params").state, params)


def test_manifest_tells_how_to_rebuild(saved):
    with Checkpointer(saved) as checkpoints:
        record = checkpoints.manifest()
        assert checkpoints.latest_good_step() == 5
    assert record.extras == EXTRAS
    assert record.config_hash == manifest.json_hash(EXTRAS["config"])
    leaf = record.leaves["params/b"]
    assert (leaf["shape"], leaf["dtype"]) == ([7], "bfloat16")
    assert record.versions["jax"] == jax.__version__
    assert all((saved / "checkpoints" / "5" / name).is_file() for name in record.files)


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    state = {"w": jnp.arange(1031.0)}
    want = {"w": np.arange(1031.0, dtype=np.float32)}
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    add({"w": jnp.zeros(1031)})  # compile first, so that donation is not delayed
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(5):
            state = add(state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state)).state
    np.testing.assert_array_equal(restored["w"], want["w"])


# --- another architecture


def test_wrong_architecture_is_one_line_by_path(saved):
    wanted = abstract(make_state())
    wanted.params["w"] = jax.ShapeDtypeStruct((8, 13), jnp.float32)
    wanted.params["router"] = wanted.params.pop("b")
    with Checkpointer(saved) as checkpoints, pytest.raises(ConfigError) as e:
        checkpoints.restore(wanted)
    message = str(e.value)
    assert "\n" not in message
    assert "1 missing in it (params/router)" in message
    assert "1 only in it (params/b)" in message
    assert "params/w: [8, 1031] saved, [8, 13] wanted" in message


def test_other_dtype_only_when_asked(saved):
    params = make_state().params
    wanted = abstract(params) | {"w": jax.ShapeDtypeStruct((8, 1031), jnp.bfloat16)}
    with Checkpointer(saved) as checkpoints:
        with pytest.raises(ConfigError, match="params/w: float32 saved, bfloat16 wanted"):
            checkpoints.restore(wanted, only="params")
    with Checkpointer(saved, CheckpointConfig(cast_dtype=True)) as checkpoints:
        w = checkpoints.restore(wanted, only="params").state["w"]
    assert_same_bits(w, params["w"].astype(jnp.bfloat16))


# --- damage


def biggest_file(folder: Path) -> Path:
    return max((folder / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def flip_bit(folder: Path) -> None:
    path = biggest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(biggest_file(folder), 100)


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


# --- errors of the background


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


# --- what stays and what goes


def save_all(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, {"w": jnp.full(5, step, jnp.float32)}, {})
    checkpoints.wait()


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


# --- settings and paths


@pytest.mark.parametrize(
    "field, value", [("every", -1), ("keep", 0), ("keep_every", -1), ("timeout_seconds", 0)]
)
def test_config_names_field_and_value(field, value):
    with pytest.raises(ConfigError, match=f"checkpoint.{field}={value}: use "):
        CheckpointConfig(**{field: value})


def test_local_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert str(step_folders.checkpoint_folder("~/run")) == "/somebody/run/checkpoints"
    monkeypatch.chdir("/")
    assert str(step_folders.checkpoint_folder("run")) == "/run/checkpoints"


class Bucket(MemoryFileSystem):
    """An object store in memory: folders exist only as parts of names; no atomic rename."""

    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))


def test_step_folders_of_a_bucket(monkeypatch):
    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", lambda *_: Bucket())
    folder = step_folders.checkpoint_folder("gs://bucket/run")
    assert str(folder) == "gs://bucket/run/checkpoints" and step_folders.list_steps(folder) == []
    leaf_of = {"w": {"shape": [], "dtype": "int32", "checksum": "0"}}
    for step in range(1, 5):
        (folder / str(step) / "state").mkdir(parents=True)
        (folder / str(step) / "state" / "d").write_text("12345")
        record = manifest.make_manifest(step, leaf_of, {})
        record = dataclasses.replace(record, files=manifest.list_files(folder / str(step)))
        manifest.write(folder / str(step), record)
    assert manifest.read(folder / "3").files == {"state/d": 5}
    step_folders.tidy(folder / "3", keep=2, keep_every=0)
    assert step_folders.list_steps(folder) == step_folders.list_saved(folder) == [2, 3]
    assert (folder / "4.aside-1" / "state" / "d").read_text() == "12345"
    (folder / "3" / "state" / "d").write_text("1234")
    assert step_folders.why_not(folder / "3") == "state/d has 4 bytes, its manifest says 5 bytes"
    assert not step_folders.make_room(folder / "2", leaf_of)
    assert step_folders.make_room(folder / "3", leaf_of) and step_folders.list_saved(folder) == [2]
    assert step_folders.is_unfinished(folder / "3")


def test_bucket_that_cannot_be_opened_is_one_line(monkeypatch):
    def absent(*_):
        raise ImportError("install gcsfs")

    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", absent)
    with pytest.raises(ConfigError, match="'gs://bucket/run' cannot be opened: ImportError: ins"):
        step_folders.checkpoint_folder("gs://bucket/run")


# --- a save that fails


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
