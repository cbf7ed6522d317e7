"""Content from outside: bytes of files, of pipes and of files in buckets, and JSON."""

import errno
import io
import json
import math
import os
import stat
import threading
from typing import Any, BinaryIO

from hnet.errors import ConfigError, first_line, shown

_PIPE_SECONDS = 5.0


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for text from outside: every fault is a ValueError, also deep nesting."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def without_nan(value: Any) -> Any:
    """JSON content with NaN and infinity replaced by None, since JSON has neither."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: without_nan(v) for name, v in value.items()}
        case list() | tuple():
            return [without_nan(v) for v in value]
        case _:
            return value


def json_text(content: Any, **options: Any) -> str:
    """`json.dumps` for results: text that every JSON reader accepts (`without_nan`)."""
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(without_nan(content), allow_nan=False, **options)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a file or pipe, also of one in a bucket. Raises OSError like `open_bytes`."""
    with open_bytes(path) as file:
        return file.read()


def open_bytes(path: str | os.PathLike) -> BinaryIO:
    """A file or pipe opened for reading; one in a bucket is read whole. Raises OSError also for
    what cannot be a path, for a device, which may have no end, and for a pipe that nothing writes
    to."""
    if "://" in os.fspath(path):
        from etils import epath

        try:
            return io.BytesIO(epath.Path(path).read_bytes())
        except OSError:
            raise
        except Exception as e:  # each file system raises its own type
            raise OSError(errno.EINVAL, f"it cannot be opened ({first_line(e)})") from None
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise OSError(errno.EINVAL, "it cannot be a path") from None
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a device: give a file")
    if stat.S_ISFIFO(mode):
        return _open_pipe(path)
    return open(path, "rb")


def _open_pipe(path: str | os.PathLike) -> BinaryIO:
    """A pipe, once something has opened it for writing. Raises OSError if nothing does within
    `_PIPE_SECONDS`."""
    opened: list[int] = []
    thread = threading.Thread(target=lambda: opened.append(os.open(path, os.O_RDONLY)), daemon=True)
    thread.start()
    thread.join(_PIPE_SECONDS)
    if not (has_writer := bool(opened)):
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # ends the thread's `open`
        thread.join()
    if not has_writer:
        os.close(opened[0])
        raise OSError(errno.EINVAL, "it is a pipe that nothing writes to")
    return open(opened[0], "rb")


def read_json(path: str | os.PathLike, what: str = "file") -> Any:
    """Content of a JSON file. Raises a one-line ConfigError that calls the file `what`."""
    try:
        return parse_json(read_bytes(path))
    except OSError as e:
        raise ConfigError(f"{what} {os.fspath(path)!r}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{what} {os.fspath(path)!r} is not JSON: {e}") from None


def read_object(path: str | os.PathLike, what: str, **kinds: Any) -> dict[str, Any]:
    """Content of a JSON file that a command wrote: an object with values of these types, by name.

    Raises ConfigError, which calls the file `what`, for other content.
    """
    content = read_json(path, what)
    where = f"{what} {os.fspath(path)!r}"
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds no JSON object: restore or remove it")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ConfigError(
                f"{where}: {name}={shown(content.get(name))} was not written there: restore or "
                "remove the file"
            )
    return content
