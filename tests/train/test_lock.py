"""One writer per directory: a second one is refused, with an error that names the first."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hnet.errors import ConfigError
from hnet.train import lock
from hnet.train.lock import DirectoryLock, Locked, has_ended, process_name
from tests.buckets import empty_bucket

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from hnet.train.lock import DirectoryLock
with DirectoryLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "a" / "run"
    with DirectoryLock(folder):
        with pytest.raises(Locked, match=rf"workdir=.*is in use by process {os.getpid()} on") as e:
            DirectoryLock(folder).__enter__()
        assert "\n" not in str(e.value) and sys.argv[0] in str(e.value)
        with DirectoryLock(tmp_path / "other"), pytest.raises(Locked, match="^out="):
            DirectoryLock(folder, "out").__enter__()
    assert list(tmp_path.iterdir()) == []  # it removed its unused files
    with DirectoryLock(folder):
        (folder / "file").touch()
    assert [p.name for p in folder.iterdir()] == ["file"]


def test_a_holder_that_was_killed_blocks_no_other_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Locked, match=f"process {child.pid} on"):
            DirectoryLock(tmp_path).__enter__()
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / lock.FILE_NAME).exists()
    with DirectoryLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "it is a file"),
        ("file/run", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("/proc/run", "No such file or directory"),
        ("/dev/null", "it is a file"),
    ],
)
def test_a_directory_that_cannot_be_is_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^workdir=.* cannot be written to .*{reason}") as e:
        DirectoryLock(tmp_path / name).__enter__()
    assert "\n" not in str(e.value) and len(str(e.value)) < 250
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_processes_that_have_ended_are_known_on_this_machine_only():
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        name = process_name().rpartition("/")[0] + f"/{child.pid}"
        assert not has_ended(name)
    assert has_ended(name)
    assert not has_ended(f"elsewhere/{child.pid}") and not has_ended("") and not has_ended("a/b")


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)
    return empty_bucket(monkeypatch).store


def locks(store):
    return [path for path in store if path.endswith(lock.FILE_NAME)]


def test_a_bucket_has_one_writer_and_a_lock_left_over_is_taken(bucket, monkeypatch):
    held = DirectoryLock("gs://bucket/run")
    with held:
        (path,) = locks(bucket)
        with pytest.raises(Locked, match=rf"gs://bucket/run\' is in use by process {os.getpid()}"):
            DirectoryLock("gs://bucket/run").__enter__()
        left_over = bucket[path]
    assert locks(bucket) == []
    bucket[path] = left_over  # the lock of this live process, without heartbeats
    with DirectoryLock("gs://bucket/run"):
        assert bucket[path] is not left_over
    bucket[path] = left_over
    monkeypatch.setattr(lock, "has_ended", lambda process: process == process_name())
    monkeypatch.setattr(lock, "STALE_SECONDS", 60)  # no wait for a process that has ended
    with DirectoryLock("gs://bucket/run"):
        pass
    assert locks(bucket) == []


def test_of_two_that_write_at_once_the_last_one_holds_a_bucket(bucket, monkeypatch):
    first, write = [], lock._Beating._write

    def write_before_another(self):
        write(self)
        if not first:
            first.append(self)
            other._write()

    other = lock._Beating(lock.work_folder("gs://bucket/run") / lock.FILE_NAME, "it")
    monkeypatch.setattr(lock._Beating, "_write", write_before_another)
    with pytest.raises(Locked):
        DirectoryLock("gs://bucket/run").__enter__()
    assert len(locks(bucket)) == 1
