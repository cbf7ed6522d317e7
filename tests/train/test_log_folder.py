"""Logs and configuration of a run whose work directory is in a bucket."""

import json
from dataclasses import replace

import pytest

from hnet.errors import ConfigError
from hnet.inspect import mirror
from hnet.train.log_folder import LogFolder
from hnet.train.workdir import claim_workdir, read_config
from tests.buckets import empty_bucket
from tests.training import tiny_run


@pytest.fixture
def bucket(monkeypatch):
    files = empty_bucket(monkeypatch)
    monkeypatch.setattr(mirror, "_open", lambda url: (files, url.removeprefix("gs:/")))
    return files


def test_logs_of_a_bucket_go_on_where_an_earlier_start_left_them(bucket):
    for start in ("one\n", "two\n"):
        logs = LogFolder("gs://bucket/run", period=3600)
        (logs.path / "tensorboard" / "boundaries").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "tensorboard/boundaries/steps.jsonl"):
            with (logs.path / name).open("a") as f:
                f.write(start)
        other_host = LogFolder("gs://bucket/run", goes_on=False, period=3600)
        logs.copy()
        other_host.close()
        assert bucket.cat("/bucket/run/metrics.jsonl").endswith(start.encode())
        logs.close()
        assert not logs.path.exists()
    assert bucket.cat("/bucket/run/metrics.jsonl") == b"one\ntwo\n"
    assert bucket.cat("/bucket/run/tensorboard/boundaries/steps.jsonl") == b"one\ntwo\n"


def test_a_local_folder_is_written_in_place(tmp_path):
    logs = LogFolder(str(tmp_path))
    assert logs.path == tmp_path
    logs.close()
    assert tmp_path.exists()


def test_the_configuration_of_a_run_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(tiny_run(tmp_path), workdir="gs://bucket/claimed")
    claim_workdir(config)
    assert read_config("gs://bucket/claimed") == config
    longer = replace(config, train=replace(config.train, steps=99))
    claim_workdir(longer)
    kept = json.loads(bucket.cat("/bucket/claimed/config-1.json"))
    assert read_config("gs://bucket/claimed") == longer and kept["train"]["steps"] == 8
    with pytest.raises(ConfigError, match="seed=5, but the run in workdir=gs://bucket/claimed"):
        claim_workdir(replace(config, seed=5))
    assert list(tmp_path.iterdir()) == []
