"""Input and output files named by the user. Existing files are never overwritten or truncated.

Every error is a ConfigError with a one-line message that names the setting, its value and the
remedy.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hnet.errors import ConfigError, shown
from hnet.files import read_bytes

_BELOW = ("x" * 99,) * 4  # names below a folder, longer than those of any run


def read_file(path: str | os.PathLike, field: str) -> bytes:
    """Content of the file or pipe at `path`, given by the setting `field`. Raises ConfigError."""
    with one_line(path, field):
        return read_bytes(path)


def new_file(path: str | os.PathLike, field: str) -> Path:
    """Check that a new file can be created at `path`, and return the path. Call it before the work
    whose result is written there. Raises ConfigError."""
    local_folder(path, field, ending=1)
    with one_line(path, field):
        if _exists(Path(path)):
            raise ConfigError(f"{field}={_named(path)} exists: choose another name")
    return Path(path)


def local_folder(path: str | os.PathLike, field: str, *, ending: int = 0) -> Path:
    """Check that files can be made in a folder, which may not exist yet, and return its path.

    Every command calls this, `new_file` or `check_workdir` before any work. It makes and removes an
    empty folder in the innermost folder that exists. ending: number of names at the end of the
    path that belong to a file. Raises ConfigError.
    """
    where = f"{field}={_named(path)}"
    if not os.fspath(path) or "://" in os.fspath(path):
        raise ConfigError(f"{where} is no local path: give one")
    with one_line(path, field):
        absolute = Path(path).absolute()
        folder = next(p for p in [absolute, *absolute.parents][ending:] if _exists(p))
        if not folder.is_dir():
            raise ConfigError(f"{where}: {_named(folder)} is no folder: choose another name")
        if not ending:
            _exists(absolute.joinpath(*_BELOW))  # raises if names of files in it would be too long
        if not os.access(folder, os.W_OK | os.X_OK) or not _takes_files(folder):
            raise ConfigError(f"{where}: {_named(folder)} cannot be written to: choose another")
    return Path(path)


def _takes_files(folder: Path) -> bool:
    """Whether something can be made in a folder. /proc, for one, only says that it can."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".hnet-", dir=folder))
    except OSError:
        return False
    return True


def new_files(folder: str | os.PathLike, names: list[str], field: str) -> list[Path]:
    """Paths of several new files in a folder. Raises ConfigError if one of them exists."""
    local_folder(folder, field)
    return [new_file(Path(folder) / name, field) for name in names]


def write_new(path: str | os.PathLike, content: str | bytes, field: str) -> None:
    """Create a new file, and its folders. The file is removed if writing fails."""
    data = content.encode() if isinstance(content, str) else content
    with one_line(path, field):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            try:
                file.write(data)
                file.flush()
            except BaseException:
                os.unlink(path)
                raise


def lock(file: IO, where: str) -> None:
    """Let no other process write an output, `where` in messages, until this file is closed.

    Raises ConfigError if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
    except BlockingIOError:
        raise ConfigError(f"{where} is being written by another process: wait for it") from None


@contextlib.contextmanager
def one_line(path: str | os.PathLike, field: str) -> Iterator[None]:
    """Convert operating-system errors about a path to ConfigError."""
    where = f"{field}={_named(path)}"
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist: give another path") from None
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror or e}: give another path") from None
    except ValueError as e:
        if "null" not in str(e):  # "embedded null byte": not a valid path
            raise
        raise ConfigError(f"{where} is no path: give another") from None


def _named(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    return repr(text) if len(text) < 300 else shown(text)


def _exists(path: Path) -> bool:
    """Whether the path exists; a dangling link does. Raises OSError if this is unknown."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
