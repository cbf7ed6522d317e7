"""Strict numerics for every test: no silent promotion of rank or dtype, eight CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("hnet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hnet")


@pytest.fixture(autouse=True)
def no_compilation_cache_of_another_test():
    """Commands that a test calls turn the cache on; executables of other devices are in it."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compilation():
    """Fast compilation, for modules that compile much and do not need the results of the optimized
    programs; `networks.quick_jit` does the same for one function."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
