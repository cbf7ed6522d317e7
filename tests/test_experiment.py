"""A step of one's own, from Python, without a change in the package."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet import train
from hnet.loss import next_byte_nll
from hnet.train import loop
from hnet.train.config import CheckpointConfig, EvalConfig, TrainConfig
from tests.training import build, rows, tiny_run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "build", build)


def config_of(workdir, steps):
    return tiny_run(
        workdir,
        train=TrainConfig(steps=steps, log_every=1),
        eval=EvalConfig(every=0, probe_bytes=20),
        checkpoint=CheckpointConfig(every=2),
    )


def with_sgd(run):
    """Plain gradient descent on cross-entropy, and a number of its own among the metrics."""

    def step(state, batch, numbers, *, capacities):
        def loss(params):
            logits_BLV, _ = nnx.merge(run.graph, params)(
                batch["input_ids"], batch["segment_ids"], capacities=capacities
            )
            return jnp.mean(next_byte_nll(logits_BLV, batch["input_ids"]))

        value, grads = jax.value_and_grad(loss)(state.params)
        _, metrics = run.step(state, batch, numbers, capacities=capacities)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        return state._replace(step=state.step + 1, params=params), metrics | {"mine": value}

    return replace(run, step=step)


def test_a_step_of_ones_own_trains_is_logged_and_resumes_bit_for_bit(tmp_path):
    whole = train.run(config_of(tmp_path / "whole", 4), with_sgd)
    train.run(config_of(tmp_path / "parts", 2), with_sgd)
    parts = train.run(config_of(tmp_path / "parts", 4), with_sgd)
    for ours, theirs in zip(
        jax.tree.leaves(parts.state.params), jax.tree.leaves(whole.state.params)
    ):
        assert np.array_equal(ours, theirs)
    logged = rows(config_of(tmp_path / "whole", 4))
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert all(np.isfinite(row["mine"]) for row in logged)
    plain = train.run(config_of(tmp_path / "plain", 4))
    assert not np.array_equal(*(
        jax.tree.leaves(outcome.state.params)[0] for outcome in (whole, plain)
    ))  # fmt: skip
