"""Profiles of some steps of a run, for TensorBoard's profile plugin."""

import contextlib
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from hnet.errors import ConfigError, first_line
from hnet.train.config import ProfileConfig

_IN_VAIN = (
    "libtpu is loaded but there is no TPU, and its profiler would kill the process: set the "
    "environment variable JAX_PLATFORMS=cpu"
)


class Trace:
    """A profile of the steps FIRST to LAST - 1, and of the next steps at each SIGUSR1.

    A run that resumes within this range profiles the rest; a run that ends within a profile keeps
    the part. A signal during a profile has no effect. Of several processes each profiles itself.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
    ):
        self.first, self.last = config.range
        if self.last and _loads_libtpu_in_vain():
            raise ConfigError(f"profile.steps={config.steps!r}: {_IN_VAIN}")
        self.folder, self.say, self.signal_steps = folder, say, config.signal_steps
        self.is_running = self.is_wanted = False
        self.until = 0
        self._old: Callable | int | None = None

    def listen(self) -> None:
        """Profile at SIGUSR1 from now on. Python handles signals in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGUSR1, self._on_signal)

    def end(self) -> None:
        """End a profile that runs, and restore the former handler of the signal."""
        self.close()
        if self._old is not None:
            signal.signal(signal.SIGUSR1, self._old)
        self._old = None

    def _on_signal(self, *_) -> None:
        self.is_wanted = not self.is_running

    @contextlib.contextmanager
    def step(self, done: int):
        """Context for the step after `done` steps."""
        is_wanted, self.is_wanted = self.is_wanted, False
        if not self.is_running and self.first <= done < self.last:
            self._begin(done, self.last)
        elif not self.is_running and is_wanted and _loads_libtpu_in_vain():
            self.say(f"SIGUSR1: no profile, because {_IN_VAIN}")
        elif not self.is_running and is_wanted:
            self._begin(done, done + self.signal_steps)
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield
        if self.is_running and done + 1 >= self.until:
            self.close()

    def _begin(self, done: int, until: int) -> None:
        self.say(f"step {done}: the next {until - done} are profiled, into {self.folder}")
        with self._guarded():
            jax.profiler.start_trace(str(self.folder))
            self.is_running, self.until = True, until
        if not self.is_running:
            self.last = 0  # not again at the next step

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say what the profiler raises, as on a full disk; the run goes on."""
        try:
            yield
        except Exception as e:  # the profiler raises errors of several kinds
            self.say(f"no profile in {self.folder} ({first_line(e)}): the run goes on without it")

    def close(self) -> None:
        """End the profile, if one runs."""
        if self.is_running:
            self.is_running = False
            with self._guarded():
                jax.profiler.stop_trace()
                self.say(f"profile written: {self.folder}")


def _loads_libtpu_in_vain() -> bool:
    """Whether JAX loads libtpu (installed e.g. for `tpu.plan`) on a machine without a TPU."""
    wanted = jax.config.jax_platforms or "tpu"
    is_installed = importlib.util.find_spec("libtpu") is not None
    return "tpu" in wanted and is_installed and jax.default_backend() != "tpu"
