"""Files that people name. What they made is never overwritten, cut or half replaced.

Every error is a ConfigError of one line that names the setting, its value and the remedy.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hnet.errors import ConfigError
from hnet.fields import shown


def read_file(path: str | os.PathLike, field: str) -> bytes:
    """The content of a file or pipe that the setting `field` names. Raises ConfigError."""
    with one_line(path, field):
        mode = os.stat(path).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ConfigError(f"{field}={_named(path)} is a device: give a file")
        return Path(path).read_bytes()


def new_file(path: str | os.PathLike, field: str) -> Path:
    """A path where a file can be made, and none is. Call it before the work whose result goes
    there. Raises ConfigError."""
    where = f"{field}={_named(path)}"
    if not os.fspath(path) or "://" in os.fspath(path):
        raise ConfigError(f"{where} is no local path: give one")
    with one_line(path, field):
        if _exists(Path(path)):
            raise ConfigError(f"{where} exists: choose another name")
        folder = next(p for p in Path(path).absolute().parents if _exists(p))
        if not folder.is_dir():
            raise ConfigError(f"{where}: {_named(folder)} is no folder: choose another name")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{where}: {_named(folder)} cannot be written to: choose another")
    return Path(path)


def new_files(folder: str | os.PathLike, names: list[str], field: str) -> list[Path]:
    """The paths of several files in a folder, of which none exists yet. Raises ConfigError."""
    new_file(Path(folder) / ".new", field)  # says what is wrong with the folder
    return [new_file(Path(folder) / name, field) for name in names]


def write_new(path: str | os.PathLike, content: str | bytes, field: str) -> None:
    """Write a file that does not exist, and its folders. Nothing is left of it if that fails."""
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


@contextlib.contextmanager
def one_line(path: str | os.PathLike, field: str) -> Iterator[None]:
    """What the system says of a path, as ConfigError."""
    where = f"{field}={_named(path)}"
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist: give another path") from None
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror or e}: give another path") from None
    except ValueError as e:
        if "null" not in str(e):  # a zero byte, which no path has
            raise
        raise ConfigError(f"{where} is no path: give another") from None


def _named(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    return repr(text) if len(text) < 300 else shown(text)


def _exists(path: Path) -> bool:
    """Whether there is anything, a dangling link included. Raises OSError if that is unknown."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
