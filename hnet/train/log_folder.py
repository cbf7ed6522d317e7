"""Where a run writes its logs: into its work directory, or beside a bucket and copied there.

An object store cannot append, so the logs of a run in a bucket (``gs://...``) grow in a local
folder.
"""

import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from hnet.inspect.mirror import Mirror
from hnet.train.step_folders import work_folder

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class LogFolder:
    """`path` is the local folder. Close it: the last copy to a bucket is made then."""

    def __init__(self, workdir: str, *, goes_on: bool = True, period: float = 60.0):
        """goes_on: bring the logs of an earlier start from a bucket, to go on in them. Only the one
        process that writes them may: a second one would put its old copy in their place.

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
        """Bring a bucket up to date now, so that its logs are never behind a checkpoint."""
        if self._mirror:
            self._mirror.copy()

    def close(self) -> None:
        """Copy what is left, and remove what was only kept for that."""
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
