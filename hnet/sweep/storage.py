"""The Optuna storage that the workers of a sweep share."""

import os
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from hnet.errors import ConfigError
from hnet.outputs import new_file, read_file

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _WholeLines(JournalFileSymlinkLock):
    """A lock whose holder writes after a complete line.

    A worker that is killed while writing leaves an incomplete line, which readers skip. A line
    written after it would make the journal unreadable, so `acquire` removes it.
    """

    def __init__(self, journal: str):
        super().__init__(journal)
        self.journal = journal

    def acquire(self) -> bool:
        acquired = super().acquire()
        with open(self.journal, "rb+") as f:
            last = f.seek(0, os.SEEK_END) and (f.seek(-1, os.SEEK_END), f.read())[1]
            if last and last != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        return acquired


_FIRST = b'{"op_code":'  # first bytes of a journal


def _check_journal(where: str) -> None:
    """Raise ConfigError for a file that is not a journal; its last line could otherwise be lost."""
    if not os.path.lexists(where):
        new_file(where, "storage")
        return
    start = read_file(where, "storage")[: len(_FIRST)]
    if not _FIRST.startswith(start):
        raise ConfigError(f"storage={where!r} is no journal of a sweep: give another file")


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """Open a journal file, or a database by its URL. Raises ConfigError if that fails."""
    try:
        if "://" in where:
            return optuna.storages.RDBStorage(where)
        _check_journal(where)
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        journal = JournalFileBackend(where, lock_obj=_WholeLines(where))
        return optuna.storages.JournalStorage(journal)
    except ConfigError:
        raise
    except Exception as e:  # anything a database driver, or its absence, raises
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ConfigError(
            f"storage={where!r} cannot be opened ({reason[0]}): give a file, or a URL such as "
            "postgresql://user@host/database whose driver is installed"
        ) from None


def pruner(name: str) -> optuna.pruners.BasePruner:
    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=4)
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner()
        case "none":
            return optuna.pruners.NopPruner()
        case other:
            raise ConfigError(f"pruner={other!r}: use none, median or halving")
