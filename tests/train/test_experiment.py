"""A step of one's own, from Python, without a change in the package."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet import train
from hnet.train import loop
from hnet.train.config import CheckpointConfig, EvalConfig, TrainConfig
from hnet.train.observer import Observer
from tests.training import build, rows, tiny_run

SHRINK = 0.5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "build", build)


def config_of(workdir, steps):
    return tiny_run(
        workdir,
        train=TrainConfig(steps=steps, log_every=1),
        eval=EvalConfig(every=0, probe_bytes=20),
        checkpoint=CheckpointConfig(every=1),
    )


def with_shrunk_embeddings(run):
    """The embeddings are multiplied after each update, and their mean square is logged."""

    def step(state, batch, numbers, *, capacities):
        state, metrics = run.step(state, batch, numbers, capacities=capacities)
        embedding = state.params["embeddings"]["embedding"] * SHRINK
        params = state.params | {"embeddings": {"embedding": embedding}}
        mine = jnp.mean(jnp.square(embedding))
        return state._replace(params=params), metrics | {"mine": mine}

    return replace(run, step=step)


class Watch(Observer):
    """Notes what it is called with; leaves step 2 out of the log."""

    def __init__(self):
        self.steps, self.logs, self.evaluations, self.lines = [], [], [], []

    def step(self, row):
        self.steps.append(row["step"])
        return row["step"] != 2

    def logged(self, row, seconds):
        self.logs.append((row["step"], seconds > 0))

    def evaluated(self, step, evaluation, seconds):
        self.evaluations.append((step, evaluation.bpb > 0, seconds > 0))

    def said(self, text):
        self.lines.append(text)


def test_a_step_of_ones_own_trains_is_logged_observed_and_resumes(tmp_path):
    first = train.run(config_of(tmp_path, 1), with_shrunk_embeddings)
    start = jax.device_get(first.program.init().params["embeddings"]["embedding"])
    watch = Watch()
    outcome = train.run(config_of(tmp_path, 3), with_shrunk_embeddings, watch)
    logged = {row["step"]: row["mine"] for row in rows(config_of(tmp_path, 3))}
    assert watch.steps == [2, 3] and watch.logs == [(3, True)] and list(logged) == [1, 3]
    assert watch.evaluations == [(3, True, True)] and watch.lines[0].startswith("train.steps=3")
    assert any("held-out" in line for line in watch.lines)
    logged = list(logged.values())
    expected = np.mean(np.square(start)) * SHRINK ** (2 * np.array([1, 3]))
    np.testing.assert_allclose(logged, expected, rtol=0.05)  # updates of 3e-3 move them too
    end = np.mean(np.square(outcome.state.params["embeddings"]["embedding"]))
    np.testing.assert_allclose(end, logged[-1], rtol=1e-5)
