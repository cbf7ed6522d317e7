"""Strict numerics for every test: no silent promotion of rank or dtype, eight CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("hnet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hnet")


@pytest.fixture(scope="module")
def quick_compilation():
    """For a module that compiles much and whose results need not be those of the programs people
    run; `networks.quick_jit` does the same for one function."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
