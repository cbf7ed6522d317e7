"""Freed memory stays with the process, so that a compiled step finds it mapped."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse what a step on the CPU frees instead of giving it back; True if so.

    XLA allocates the temporaries of a CPU program anew in every call. glibc maps and unmaps blocks
    of that size each time, and the kernel clears every page again: a fifth of a training step. To
    be called before threads are started, that is before the first computation. The process keeps
    the most memory that it ever needed. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) for name, value in settings])
