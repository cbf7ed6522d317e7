"""A thread that ends this host with one line when another host of the run has failed or died.

JAX ends it too, but with a stack of C++ that names no host: at once when the connection to host 0
closes, and when another host was silent for JAX's heartbeat timeout. `Guard` looks at what hosts
publish in the key-value store and is faster than the second; `name_the_end` replaces the first.
"""

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from hnet.printable import printable

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""time in which a host can end by itself, with its own message and exit code, before it is ended"""
REMEDY = "start the same command on all hosts again: it resumes from the last checkpoint"
FAILED = 1  # exit code


class Guard:
    """Publishes that this host lives and watches the others."""

    def __init__(
        self, client: Any, address: str, host: int, timeout_seconds: float,
        describe: Callable[[int], str],
    ):  # fmt: skip
        """address: HOST:PORT of host 0. describe: a host in words, read from the key-value store of
        `client`."""
        self._client, self._host, self._timeout = client, host, timeout_seconds
        name, _, port = address.rpartition(":")
        self._address = name.strip("[]"), int(port)
        self._describe, self._first_host = describe, describe(0)
        self._beats: dict[int, tuple[str, float]] = {}
        self._beat_at = -timeout_seconds
        self._count, self.step = 0, 0
        self.own_code: int | None = None
        """exit code of this host, which has said why it ends"""
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._may_end = threading.Event()  # nothing to wait for: the main thread waits itself
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This host has done its work: others no longer expect a sign of life."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_delete(f"hnet/beat/{self._host}")

    def wait_for_end(self) -> None:
        """Wait until a dead host must have been noticed, which ends this process."""
        self._may_end.set()
        time.sleep(self._timeout + GRACE_SECONDS)

    def first_host_answers(self) -> bool:
        """Whether host 0 still accepts connections after some time, as it does until it ends."""
        try:
            for _ in range(20 if self._host else 0):
                socket.create_connection(self._address, 2).close()
                time.sleep(0.1)
        except OSError:
            return False
        return True

    def connection_closed(self) -> None:
        """End this process because host 0 does not answer. Called by a thread of JAX."""
        with contextlib.suppress(RuntimeError):  # the interpreter may be ending
            self._end(f"{self._first_host} has failed or died: its connection is closed")
        os._exit(FAILED if self.own_code is None else self.own_code)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 may have ended
                for host in self._hosts("failed"):
                    if host != self._host:
                        self._end(f"{self._describe(host)} has failed")
                if time.monotonic() - self._beat_at > self._timeout / 6:
                    self._beat()

    def _hosts(self, key: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"hnet/{key}/")
        return {int(name.rpartition("/")[2]): value for name, value in found}

    def _beat(self) -> None:
        now = self._beat_at = time.monotonic()
        self._count += 1
        beat = f"{self._count} {self.step}"
        self._client.key_value_set(f"hnet/beat/{self._host}", beat, allow_overwrite=True)
        before = self._beats
        self._beats = {
            host: before[host] if before.get(host, ("",))[0] == beat else (beat, now)
            for host, beat in self._hosts("beat").items()
        }
        self._first_host = self._describe(0)
        for host, (beat, since) in self._beats.items():
            if (silence := now - since) > self._timeout:
                why = f"has died: no sign of life for {silence:.0f} s, the last at step "
                why += beat.partition(" ")[2]
                who = self._describe(host)
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host told it
                    self._client.key_value_set(f"hnet/failed/{host}", why)
                self._end(f"{who} {why}")

    def _end(self, why: str) -> None:
        """Give the main thread time to end by itself, then end this process."""
        with self._ending:
            self._may_end.wait(GRACE_SECONDS)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            if self.own_code is not None:
                os._exit(self.own_code)
            line = f"error: {why}; this host was at step {self.step}; {REMEDY}"
            os.write(2, (printable(line) + "\n").encode())
            if self._host == 0:
                time.sleep(2 * POLL_SECONDS)  # the others read what was published
            os._exit(FAILED)


@contextlib.contextmanager
def name_the_end(module: Any, guard: Callable[[], Guard | None]):
    """Clients that `module` (of jaxlib) makes call `connection_closed` of `guard()`, if there is
    one, instead of ending the process with a stack of C++.

    jaxlib calls Python where it gives up. 0.10 cannot convert the argument of that call, and the
    C++ exception of the conversion ends in the terminate handler, which is therefore set too.
    """
    connect, former = module.get_distributed_runtime_client, []

    def give_up(*status) -> None:
        found = guard()
        if found and not found.first_host_answers():
            found.connection_closed()
        if not status and former:  # another C++ exception
            former[0]()
        os.write(2, b"error: the processes of this run have lost contact: start them again\n")
        os._exit(FAILED)

    with contextlib.suppress(OSError, AttributeError):  # another C++ library: JAX ends as it does
        kind = ctypes.CFUNCTYPE(None)
        _kept.append(kind(give_up))
        library = ctypes.CDLL("libc++.1.dylib" if sys.platform == "darwin" else "libstdc++.so.6")
        library._ZSt13set_terminatePFvvE.restype = kind
        former.append(library._ZSt13set_terminatePFvvE(_kept[-1]))
        module.get_distributed_runtime_client = lambda *args, **settings: connect(
            *args, missed_heartbeat_callback=give_up, **settings
        )
    try:
        yield
    finally:
        module.get_distributed_runtime_client = connect


_kept: list[Any] = []  # callbacks that C++ may call until the process ends
