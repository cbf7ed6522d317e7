"""A failed save is one line: what Orbax and TensorStore print about it is left out."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_ORBAX = f"{os.sep}orbax{os.sep}"


def _is_told(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or _ORBAX not in record.pathname


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop errors that Orbax logs, since `Checkpointer` raises them, and the tracebacks of writes
    that TensorStore finishes after Orbax has given up and closed its event loop."""
    log, hook = logging.getLogger("absl"), sys.excepthook

    def excepthook(kind, value, trace):
        if not (kind is RuntimeError and "Event loop is closed" in str(value)):
            hook(kind, value, trace)

    log.addFilter(_is_told)
    sys.excepthook = excepthook
    try:
        yield
    finally:
        log.removeFilter(_is_told)
        if sys.excepthook is excepthook:
            sys.excepthook = hook
