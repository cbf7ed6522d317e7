"""Copy a growing log folder to a remote file system in the background."""

import logging
import os
import threading
from pathlib import Path

from hnet.errors import ConfigError

_log = logging.getLogger(__name__)


class Mirror:
    """Copies changed files of `source` to the URL `target` (gs://, s3://, ...) every `period` s.

    Object stores cannot append, so the whole of a changed file is copied. A failed copy is logged
    and tried again after the next period, so a network failure does not stop a training run.
    """

    def __init__(self, source: str | os.PathLike, target: str, *, period: float = 60.0):
        self.source = Path(source)
        self.fs, self.target = _open(target)
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._period = period
        self._thread = threading.Thread(target=self._run, name="log mirror", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self.copy()

    def copy(self) -> None:
        """Copy changed files now."""
        with self._lock:
            for path in sorted(p for p in self.source.rglob("*") if p.is_file()):
                self._copy_file(path)

    def _copy_file(self, path: Path) -> None:
        try:
            stat = path.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._copied.get(path) == version:
                return
            to = f"{self.target}/{path.relative_to(self.source).as_posix()}"
            self.fs.makedirs(to.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(os.fspath(path), to)
            self._copied[path] = version
        except Exception as e:  # file systems raise different errors; none may end the run
            _log.warning("log mirror: %s is not copied to %s yet: %s", path, self.target, e)

    def close(self) -> None:
        """Stop the thread and copy the remaining changes."""
        self._stop.set()
        self._thread.join()
        self.copy()


def _open(url: str):
    try:
        import fsspec  # imported here because only a run with a mirror needs it

        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:
        raise ConfigError(
            f"log mirror {url!r} cannot be opened ({e}): install fsspec and the package of that "
            "file system (gcsfs for gs://), or leave the mirror out"
        ) from None
    return fs, path.rstrip("/")
