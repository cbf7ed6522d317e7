"""Immediate answer to Ctrl-C, also while the main thread compiles and runs no Python.

Python runs a signal handler between two bytecode instructions of the main thread, which can take
minutes during a compilation. The interpreter also writes each signal's number to a wake-up file
descriptor; here a thread reads it from a pipe.
"""

import contextlib
import os
import signal
import sys
import threading

END_SECONDS = 2.0  # seconds from the second Ctrl-C until the process is ended by force
INTERRUPTED = 130  # exit code, as shells report Ctrl-C

_HEARD = (
    "Ctrl-C: the run saves and ends as soon as what is computed or compiled now is done; "
    "Ctrl-C again ends it at once"
)


class Interrupts(contextlib.AbstractContextManager):
    """Answers Ctrl-C while it is open: the first with a message, the second by ending the process.

    Must be created in the main thread.
    """

    def __init__(self):
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
        self._thread.start()

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; signal handlers stay as they are."""
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._former)
        os.close(self._writer)  # the thread then reads end-of-file and ends
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        heard = 0
        while number := os.read(self._reader, 1):
            if number[0] != signal.SIGINT:
                continue
            heard += 1
            if heard == 1:
                print(_HEARD, file=sys.stderr, flush=True)
            elif not self._closed.wait(END_SECONDS):
                self._end()

    def _end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)
