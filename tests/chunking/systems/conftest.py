"""Random numbers that another code drew."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def noise(monkeypatch):
    """Give the stored uniform numbers, (B, L), to the relaxed Bernoulli instead of drawn ones."""
    told = SimpleNamespace(uniform=None)

    def logistic(key, shape, dtype):
        assert told.uniform.shape == shape
        return jnp.log(told.uniform) - jnp.log1p(-told.uniform)

    monkeypatch.setattr(jax.random, "logistic", logistic)
    return told
