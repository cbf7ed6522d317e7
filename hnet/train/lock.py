"""One writer per output directory: a lock that ends with its process and names its holder.

In a local folder it is a kernel lock on the file ``.lock``, which the kernel releases when the
process ends. In a bucket (``gs://...``) and on file systems without such locks it is a file that
its holder rewrites every few seconds (a heartbeat); a file without heartbeats is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from hnet.checkpoint.step_folders import work_folder
from hnet.errors import ConfigError, shown
from hnet.files import parse_json
from hnet.printable import printable

log = logging.getLogger(__name__)

FILE_NAME = ".lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0  # seconds without a heartbeat after which the lock is taken over
SETTLE_SECONDS = 2.0  # seconds after which the last of several concurrent writes is visible


class Locked(ConfigError):
    """Another process holds the directory; the message is one line that names it."""


def process_name() -> str:
    """HOST/PID NAMESPACE/PID of this process."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}/{os.getpid()}"
    return f"{socket.gethostname()}//{os.getpid()}"


def has_ended(process: str) -> bool:
    """Whether it was a process of this machine that has ended; False if that is unknown."""
    place, _, number = process.rpartition("/")
    if place != process_name().rpartition("/")[0]:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


class DirectoryLock(contextlib.AbstractContextManager):
    """Context manager that holds the lock. Folders it created are removed if they stay empty.

    Raises ConfigError if the directory cannot be written to, and Locked if another process, or
    another lock of this one, holds it.
    """

    def __init__(self, folder: str | os.PathLike, field: str = "workdir"):
        """field: name of the directory in error messages."""
        self.name, self.field = os.fspath(folder), field
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "DirectoryLock":
        where = f"{self.field}={shown(self.name)}"
        try:
            with contextlib.ExitStack() as stack:
                folder = work_folder(self.name)
                _make_folders(folder, stack)
                if "://" in self.name or not _lock_file(Path(folder) / FILE_NAME, where, stack):
                    stack.enter_context(_Beating(folder / FILE_NAME, where))
                self._stack = stack.pop_all()
        except (OSError, ValueError) as e:
            if isinstance(e, ConfigError):
                raise
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise ConfigError(f"{where} cannot be written to ({reason}): use another one") from None
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()


def _make_folders(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    if "://" in os.fspath(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        stack.callback(_remove_empty, path)
    if not folder.is_dir():
        raise NotADirectoryError(0, "it is a file")


def _remove_empty(folder: epath.Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _lock_file(path: Path, where: str, stack: contextlib.ExitStack) -> bool:
    """Take the kernel lock on a file; False if the file system has no such locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked(_refusal(where, _parsed(os.read(file, 1 << 16)))) from None
            except OSError as e:
                log.warning("%s has no file locks (%s)", path.parent, e.strerror)
                return False
            with contextlib.suppress(FileNotFoundError):  # the former holder has just removed it
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    stack.push(opened.pop_all())
                    stack.callback(path.unlink, missing_ok=True)
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps(_holder()).encode())
                    return True


def _holder() -> dict[str, Any]:
    return {
        "process": process_name(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv)[:500],
    }


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _refusal(where: str, holder: dict[str, Any]) -> str:
    host, _, process = str(holder.get("process", "?//?")).replace("//", "/").partition("/")
    known = f"process {process.rpartition('/')[2]} on {host} since {holder.get('since', '?')}"
    if command := holder.get("command"):
        known += f" ({str(command)[:200]})"
    return f"{where} is in use by {printable(known)}: wait for it to end, or use another one"


class _Beating(contextlib.AbstractContextManager):
    """A lock file with a heartbeat, written by a thread while its holder is alive.

    An object store cannot tell who was first: among several processes that start within
    SETTLE_SECONDS the last one to write holds the lock.
    """

    def __init__(self, path: epath.Path, where: str):
        self.path, self.where = path, where
        self._content = _holder() | {"token": secrets.token_hex(8), "beat": 0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "_Beating":
        self._wait_for_former()
        self._write()
        time.sleep(SETTLE_SECONDS)
        found = self._read()
        if found.get("token") != self._content["token"]:
            raise Locked(_refusal(self.where, found))
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._thread.join()
        if self._read().get("token") == self._content["token"]:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _wait_for_former(self) -> None:
        """Wait until there is no holder. Raises Locked if there is one with a heartbeat."""
        former, since = self._read(), time.monotonic()
        if former and not has_ended(str(former.get("process"))):
            log.warning("%s; it is taken over if that has ended", _refusal(self.where, former))
        while former and not has_ended(str(former.get("process"))):
            if (found := self._read()) != former:
                if found:
                    raise Locked(_refusal(self.where, found))
                return
            if time.monotonic() - since > STALE_SECONDS:
                return
            time.sleep(BEAT_SECONDS / 10)

    def _read(self) -> dict[str, Any]:
        try:
            return _parsed(self.path.read_bytes())
        except FileNotFoundError:
            return {}

    def _write(self) -> None:
        self.path.write_text(json.dumps(self._content))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._content["beat"] += 1
            try:
                if self._read().get("token", self._content["token"]) != self._content["token"]:
                    log.warning("%s", _refusal(self.where, self._read()))
                    return
                self._write()
            except Exception as e:  # bucket clients raise many types while the network is down
                log.warning("the lock of %s is not renewed: %s", self.where, e)
