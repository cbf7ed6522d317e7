"""The persistent compilation cache: where it is, what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hnet.runtime.compile_cache import default_cache_path, enable_compilation_cache


@pytest.fixture
def jax_cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compilation_cache_reports_misses_then_hits(tmp_path, jax_cache_settings):
    reported = []
    path = tmp_path / "xla"

    def compile_again():
        """Compile the same program under a new jit, as a new process would."""

        def wave(x):
            return jnp.sin(x) * 3.0

        return jax.jit(wave)(jnp.arange(13.0))

    def other(x):
        return jnp.cos(x) * 5.0

    log = enable_compilation_cache(path, report=reported.append, min_compile_seconds=0.0)
    try:
        first = compile_again()
        second = compile_again()
        jax.jit(other)(jnp.arange(13.0))
    finally:
        log.close()
    assert reported == log.entries
    ours = [e for e in log.entries if "wave" in e.name or "other" in e.name]
    assert [e.hit for e in ours] == [False, True, False]
    assert log.hits + log.misses == len(log.entries)
    assert any(path.glob("jit_wave*"))
    np.testing.assert_array_equal(first, second)
    count = len(log.entries)
    jax.jit(lambda x: x + 17)(1)
    assert len(log.entries) == count  # closed


def test_compilation_cache_folder(tmp_path, monkeypatch, jax_cache_settings, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_path() == "/caches/hnet/xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert default_cache_path() == "gs://bucket/cache"
    blocked = tmp_path / "file"
    blocked.write_text("")
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache(blocked / "xla").close()
    assert jax.config.jax_compilation_cache_dir == before
    assert "is off" in caplog.text
