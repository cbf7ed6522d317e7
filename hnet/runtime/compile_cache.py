"""JAX's persistent compilation cache, on by default, with counts of hits and misses."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Compilation:
    """One executable that was loaded or compiled."""

    name: str
    """name of the jitted function"""
    hit: bool
    """whether the executable came from the cache"""
    seconds: float
    """seconds of loading or compiling"""


class CompilationLog:
    """All executables since the log was created, in order; ``report`` is called for each.

    Compilations are counted even if the cache is off.
    """

    def __init__(self, report: Callable[[Compilation], None] | None = None):
        self.entries: list[Compilation] = []
        self._report = report
        self._thread = threading.local()  # JAX compiles in several threads
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    @property
    def hits(self) -> int:
        return sum(e.hit for e in self.entries)

    @property
    def misses(self) -> int:
        return len(self.entries) - self.hits

    def _on_event(self, event: str, **kwargs) -> None:
        if event == _HIT:
            self._thread.hit = True

    def _on_duration(self, event: str, seconds: float, **kwargs) -> None:
        if event != _COMPILED:
            return
        hit, self._thread.hit = getattr(self._thread, "hit", False), False
        entry = Compilation(str(kwargs.get("fun_name", "?")), hit, seconds)
        self.entries.append(entry)
        if self._report:
            self._report(entry)

    def close(self) -> None:
        """Stop counting; the cache itself stays on."""
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)


def default_cache_path() -> str:
    """``$JAX_COMPILATION_CACHE_DIR``, else ``hnet/xla`` in the user's cache folder."""
    if path := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return path
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(caches) / "hnet" / "xla")


def enable_compilation_cache(
    path: str | os.PathLike | None = None,
    *,
    report: Callable[[Compilation], None] | None = None,
    min_compile_seconds: float = 0.1,
) -> CompilationLog:
    """Keep compiled executables at ``path``, a folder or ``gs://``; default: the user's cache.

    On a pod only process 0 writes, so all hosts must share the folder. Executables that compile
    faster than ``min_compile_seconds`` are not kept. Anyone who can write to the folder can run
    code in this process: do not share it with people you do not trust.
    """
    folder = os.fspath(path or default_cache_path())
    counts = CompilationLog(report)
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        log.warning("compilation cache %s is off: %s", folder, e)
        return counts
    compilation_cache.reset_cache()  # JAX reads the folder's name once per process
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
    return counts
