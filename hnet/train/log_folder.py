"""Folder of a run's logs: its work directory, or a local folder that is copied to a bucket.

An object store cannot append, so the logs of a run in a bucket (``gs://...``) are written to a
local folder and copied from there.
"""

import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from hnet.checkpoint.step_folders import work_folder
from hnet.inspect.mirror import Mirror

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class LogFolder:
    """`path` is the local folder. `close` makes the last copy to the bucket."""

    def __init__(self, workdir: str, *, goes_on: bool = True, period: float = 60.0):
        """goes_on: fetch the logs of an earlier start from the bucket and append to them. Only the
        process that writes the logs may do so: another one would overwrite them with its old copy.

        Raises ConfigError if the bucket cannot be opened.
        """
        self._spool, self._mirror = None, None
        if "://" not in workdir:
            self.path = Path(workdir)
            return
        bucket = work_folder(workdir)
        self._spool = tempfile.mkdtemp(prefix="hnet-logs-")
        self.path = Path(self._spool)
        for name in (METRICS, TENSORBOARD) if goes_on else ():
            _fetch(bucket / name, self.path / name)
        self._mirror = Mirror(self.path, workdir, period=period)

    def copy(self) -> None:
        """Copy the logs to the bucket now, so that they are never older than a checkpoint."""
        if self._mirror:
            self._mirror.copy()

    def close(self) -> None:
        """Copy the rest to the bucket and remove the temporary local folder."""
        if self._mirror:
            self._mirror.close()
        if self._spool:
            shutil.rmtree(self._spool, ignore_errors=True)


def _fetch(source: epath.Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True)
        for child in source.iterdir():
            _fetch(child, target / os.path.basename(os.fspath(child)))
    elif source.exists():
        target.write_bytes(source.read_bytes())
