"""Settings of checkpoints, and folders on a disk and in a bucket."""

import dataclasses

import pytest
from etils.epath.backend import fsspec_backend

from hnet.checkpoint import manifest, step_folders
from hnet.errors import ConfigError
from hnet.train.config import CheckpointConfig
from tests.buckets import empty_bucket


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


def test_step_folders_of_a_bucket(monkeypatch):
    empty_bucket(monkeypatch)
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
