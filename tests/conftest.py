"""Strict numerics for every test: no silent promotion of rank or dtype, eight CPU devices.

All processes of a test session share one persistent compilation cache, so that both workers and the
commands that tests start compile a program once. The process that pytest starts in makes its folder
and removes it; the others inherit its path in their environment.
"""

import gc
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    OWN_CACHE = tempfile.mkdtemp(prefix="hnet-tests-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.03")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from tests.quick import MODULES, QUICK_FLAGS  # noqa: E402

# XLA reads its flags when it compiles first. Programs compile without optimizations, in a fifth of
# the time; tests of the programs that users run take `tests.networks.optimized_jit`.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK_FLAGS]
)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("hnet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hnet")

# mark -> (packages, one of which compiles for absent devices, reason to skip without any)
COMPILERS = {
    "libtpu": (("libtpu",), "libtpu is not installed (the extra tpu)"),
    "cuda": (
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
        "no CUDA plugin of JAX is installed (the extra cuda12 or cuda13)",
    ),
}

CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
SESSION = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}


def pytest_addoption(parser):
    parser.addoption(
        "--every", "--every-triple", action="store_true",
        help="every combination of parts and every named configuration, not only a few that have "
        "every part",
    )  # fmt: skip


def _in_quick_tier(path: Path) -> bool:
    folder = Path(__file__).parent
    return path.is_relative_to(folder) and path.relative_to(folder).as_posix() in MODULES


def pytest_ignore_collect(collection_path, config):
    """With `-m quick` other modules are not even imported."""
    if config.getoption("markexpr") == "quick" and collection_path.name.startswith("test_"):
        return True if not _in_quick_tier(collection_path) else None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("every"):
        items[:] = [item for item in items if not item.get_closest_marker("every")]
    for mark, (packages, reason) in COMPILERS.items():
        if any(importlib.util.find_spec(package) for package in packages):
            continue
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        if _in_quick_tier(item.path):
            item.add_marker("quick")


def pytest_collection_finish(session):
    """Collect garbage seldom: tracing makes many objects, and each search of them looks at all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_generate_tests(metafunc):
    """`few(argument, some, every, beside=())`: `every` only with --every, `beside` always."""
    for mark in metafunc.definition.iter_markers("few"):
        argument, some, every = mark.args
        names = every if metafunc.config.getoption("every") else some
        metafunc.parametrize(argument, [*names, *mark.kwargs.get("beside", ())])


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


# Folders and modules whose programs are compiled once: to write them costs a tenth of their time.
COMPILED_ONCE = ("chunking", "nn", "parts", "test_battery.py", "decode/test_stream.py")


@pytest.fixture(autouse=True, scope="module")
def only_programs_that_are_compiled_again_are_stored(request):
    path = request.path.relative_to(Path(__file__).parent).as_posix()
    if not path.startswith(COMPILED_ONCE):
        yield
        return
    for is_stored in (False, True):
        jax.config.update("jax_enable_compilation_cache", is_stored)
        compilation_cache.reset_cache()
        if not is_stored:
            yield


@pytest.fixture(autouse=True)
def the_compilation_cache_of_the_session():
    """Commands that a test calls may turn on another cache, and set what is kept in it."""
    yield
    if any(getattr(jax.config, name) != value for name, value in SESSION.items()):
        for name, value in SESSION.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="session")
def runs_use_the_devices_they_name():
    """A run uses as many devices as the axes of its mesh that are not -1 need: one by default.

    A program for eight emulated devices takes twice as long to compile as one for one device. Tests
    of sharding set the mesh, or pass `devices`.
    """
    from hnet.train import compiled_run as program
    from hnet.train.sharding import make_mesh

    def small_mesh(config, devices=None):
        if devices is None:
            axes = (config.data, config.fsdp, config.tensor)
            devices = jax.devices()[: math.prod(n for n in axes if n != -1)]
        return make_mesh(config, devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_mesh", small_mesh)
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Fast compilation, for modules that compile much and do not need the results of the optimized
    programs; `networks.quick_jit` does the same for one function."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
