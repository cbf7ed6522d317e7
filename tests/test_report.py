"""Profiles begin and end where they are asked to, whatever the run does."""

import types
from contextlib import nullcontext

import jax
import pytest

from hnet.config import ConfigError
from hnet.train import report
from hnet.train.report import Trace


@pytest.fixture
def traced(monkeypatch):
    """Calls of the profiler, which complains itself about a second start or stop."""
    calls = []
    monkeypatch.setattr(report, "_loads_libtpu_in_vain", lambda: False)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("steps", "ran", "expected"),
    [
        ("2:5", range(9), [2, 3, 4]),
        ("0:1", range(3), [0]),
        ("2:5", range(3, 9), [3, 4]),  # resumed between them
        ("2:5", range(5, 9), []),  # resumed behind them
        ("2:5", range(4), [2, 3]),  # ended between them
        ("", range(9), []),
    ],
)
def test_the_steps_that_are_traced(traced, tmp_path, steps, ran, expected):
    trace, found = Trace(steps, tmp_path), []
    for done in ran:
        with trace.step(done):
            found += [done] if traced[-1:] == ["start"] else []
    trace.close()
    assert found == expected
    assert traced == (["start", "stop"] if expected else [])


@pytest.mark.parametrize(
    ("platforms", "is_installed", "backend", "expected"),
    [
        (None, True, "cpu", True),
        ("cpu", True, "cpu", False),
        (None, False, "cpu", False),
        (None, True, "tpu", False),
    ],
)
def test_a_profile_beside_an_idle_libtpu_is_refused(
    monkeypatch, tmp_path, platforms, is_installed, backend, expected
):
    """Its profiler would end the process by a segmentation fault."""
    config = types.SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(report.jax, "config", config)
    monkeypatch.setattr(report.jax, "default_backend", lambda: backend)
    found = object() if is_installed else None
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match="JAX_PLATFORMS") if expected else nullcontext():
        Trace("2:5", tmp_path)
    Trace("", tmp_path)


@pytest.mark.parametrize("steps", ["10", "5:5", "a:b", "-1:4"])
def test_other_windows_are_refused(tmp_path, steps):
    with pytest.raises(ConfigError, match="FIRST:LAST"):
        Trace(steps, tmp_path)
