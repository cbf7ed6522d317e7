"""Trackers of experiments beside TensorBoard: an interface, two implementations, and a guard.

A tracker is a class without arguments that has the three functions of `Tracker`. Name it by
`--tracker.name package.module:Class`; `trackio` and `wandb` need the extras of these names. It
works in a thread of its own: one that raises or hangs never stops the run.
"""

import contextlib
import importlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hnet.errors import ConfigError, first_line
from hnet.parts import find_object
from hnet.train.sections import TrackerConfig

MAX_WAITING = 1000
"""number of rows that wait for a slow tracker; later ones are dropped until it catches up"""
END_SECONDS = 30.0
"""time that the end of a run leaves to a tracker for what is still waiting"""


class Tracker(Protocol):
    """Where the numbers of a run go besides its work directory. Process 0 calls it."""

    def begin(self, config: dict[str, Any]) -> None:
        """A start of the run with this configuration (JSON); `workdir` is the same at each start.
        The first call; libraries are best imported here."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by their TensorBoard tags. A step may come twice, and after a rollback again."""

    def end(self) -> None:
        """The end of this start."""


class Trackio:
    """Trackio (huggingface.co/docs/trackio): a local dashboard, without an account."""

    module = "trackio"

    def begin(self, config):
        self.client = importlib.import_module(self.module)
        project, name = config["tracker"]["project"], config["workdir"]
        self.client.init(project=project, name=name, config=config, **self.resumed(name))

    def resumed(self, name: str) -> dict[str, Any]:
        """Arguments with which a later start of the same run goes on with it."""
        return {"resume": "allow"}

    def scalars(self, step, values):
        self.client.log(values, step=step)

    def end(self):
        self.client.finish()


class Wandb(Trackio):
    """Weights & Biases (docs.wandb.ai). It drops rows of steps before its last one."""

    module = "wandb"

    def resumed(self, name):
        allowed = "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
        return {"id": allowed[-64:], "resume": "allow"}


TRACKERS: dict[str, type[Tracker]] = {"trackio": Trackio, "wandb": Wandb}


def find(name: str) -> type[Tracker]:
    """The class of a tracker. Raises ConfigError if there is none or its library is missing."""
    if name in TRACKERS:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracker.name={name!r} needs {name}, which is not installed: "
                f"pip install 'hnet-jax[{name}]'"
            )
        return TRACKERS[name]
    if ":" not in name:
        known = ", ".join(TRACKERS)
        raise ConfigError(f"tracker.name={name!r} is unknown: use {known}, or package.module:Class")
    found = find_object(name, "tracker")
    missing = [f for f in ("begin", "scalars", "end") if not callable(getattr(found, f, None))]
    if missing:
        raise ConfigError(
            f"tracker.name={name!r} has no {missing[0]}: it needs begin(config), "
            "scalars(step, values) and end()"
        )
    return found


def guarded(config: TrackerConfig, say: Callable[[str], None]) -> "Guarded | None":
    """The tracker of a run; None if it has none. Raises ConfigError like `find`."""
    return Guarded(config.name, find(config.name), say) if config.name else None


class Guarded:
    """A tracker in its own thread. The first exception ends it, with a line; the run goes on."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]):
        self.name, self._make, self._say = name, make, say
        self._calls: queue.Queue[tuple[str, tuple] | None] = queue.Queue(MAX_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def begin(self, config: dict[str, Any]) -> None:
        self._thread.start()
        self._put(("begin", (config,)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put(("scalars", (step, dict(values))))

    def end(self, seconds: float = END_SECONDS) -> None:
        """End it after all rows are passed on, or leave it after this time."""
        until = time.monotonic() + (seconds if self._thread.is_alive() else 0.0)
        for call in (("end", ()), None):
            with contextlib.suppress(queue.Full):
                self._calls.put(call, timeout=max(until - time.monotonic(), 0.0))
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._say(f"tracker {self.name} did not end within {seconds:g} s: it is left")
        if self._dropped:
            self._say(f"tracker {self.name} did not get {self._dropped} rows")

    def _put(self, call: tuple[str, tuple]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._say(f"tracker {self.name} does not keep up: it loses rows, the run goes on")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while call := self._calls.get():
                getattr(tracker, call[0])(*call[1])
        except BaseException as e:  # a library may raise SystemExit
            self._say(f"tracker {self.name} failed ({first_line(e)}): the run goes on without it")
