"""Stacks are written only for a host without heartbeats, and not too often."""

import os
from types import SimpleNamespace

import pytest

from hnet.errors import ConfigError
from hnet.runtime import distributed
from hnet.train.config import WatchdogConfig
from hnet.train.watchdog import Watchdog


def test_watchdog_writes_stacks_of_a_silent_host_only(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("hnet.train.watchdog.time", clock)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    config = WatchdogConfig(timeout_seconds=1000.0, kill_after_seconds=2900.0)
    with Watchdog(tmp_path / "run", config) as watchdog:
        for clock.now, phase in ((900.0, "load"), (1800.0, "step")):
            watchdog._look()
            watchdog.beat(phase)
        assert not (tmp_path / "run").exists()
        for clock.now in (2700.0, 2900.0, 3500.0, 4200.0):  # at most one dump per 1000 s
            watchdog._look()
        dumps = sorted((tmp_path / "run").iterdir())
        assert len(dumps) == 2 and not ended
        text = dumps[0].read_text()
        assert "no heartbeat for 1100 s, last phase 'step'" in text
        assert "test_watchdog_writes_stacks_of_a_silent_host_only" in text
        clock.now = 4701.0
        watchdog._look()
    assert ended == [distributed.REQUEUE_EXIT_CODE]


@pytest.mark.parametrize(
    "settings", [{"timeout_seconds": -1}, {"timeout_seconds": 0, "kill_after_seconds": 5}]
)
def test_watchdog_settings(settings):
    with pytest.raises(ConfigError, match="watchdog.timeout_seconds="):
        WatchdogConfig(**settings)
