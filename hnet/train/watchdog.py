"""A thread that writes the stacks of a host that hangs."""

import faulthandler
import logging
import os
import tempfile
import threading
import time
from datetime import UTC, datetime

from etils import epath

from hnet.runtime import distributed
from hnet.train.config import WatchdogConfig

log = logging.getLogger(__name__)


class Watchdog:
    """Dumps all Python stacks to ``folder`` if ``beat`` is not called for the timeout.

    Each dump is one file (``hang-host0-...txt``), at most one per timeout. The process is ended
    only if the configuration says so.
    """

    def __init__(self, folder: str | os.PathLike, config: WatchdogConfig = WatchdogConfig()):
        self.folder = epath.Path(folder)
        self.config = config
        self._phase = "start"
        self._beat_at = self._dump_at = time.monotonic()
        self._num_dumps = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.timeout_seconds:
            self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, phase: str) -> None:
        """Heartbeat: this host enters ``phase`` ("load", "step", "save", "eval", ...)."""
        self._phase = phase
        self._beat_at = time.monotonic()

    def _watch(self) -> None:
        published = None
        while not self._end.wait(min(self.config.timeout_seconds / 4, 5.0)):
            try:
                if self._phase != published:
                    published = self._phase
                    distributed.publish_phase(published)
                self._look()
            except Exception as e:  # the watchdog must survive e.g. a full disk
                log.warning("watchdog could not report: %s", e)

    def _look(self) -> None:
        now = time.monotonic()
        silence, limit = now - self._beat_at, self.config.timeout_seconds
        if silence > limit and now - self._dump_at > limit:
            self._dump_at = now
            log.warning(
                "no heartbeat for %.0f s in phase %r: stacks are in %s",
                silence, self._phase, self._dump(silence),
            )  # fmt: skip
        if 0 < self.config.kill_after_seconds < silence:
            os._exit(distributed.REQUEUE_EXIT_CODE)

    def _dump(self, silence: float) -> epath.Path:
        now = datetime.now(UTC)
        host, self._num_dumps = distributed.host_id(), self._num_dumps + 1
        header = (
            f"{now.isoformat(timespec='seconds')} host {host} pid {os.getpid()}: no heartbeat for "
            f"{silence:.0f} s, last phase {self._phase!r}\n\n"
        )
        with tempfile.TemporaryFile("w+") as f:  # faulthandler needs a file descriptor
            faulthandler.dump_traceback(f, all_threads=True)
            f.seek(0)
            stacks = f.read()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"hang-host{host}-{now:%Y%m%dT%H%M%S}-{os.getpid()}-{self._num_dumps}.txt"
        (self.folder / name).write_text(header + stacks)
        return self.folder / name
