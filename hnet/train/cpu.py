"""What makes a training step on a CPU fast that no compiled program can do for itself."""

import ctypes
import math
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse what a step frees instead of giving it back; True if it will.

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


def one_device_a_core(rows: int) -> int:
    """Make JAX see a CPU as several devices that share `rows` equally; the number of them.

    Each computes its rows on a core: XLA runs a batch of small matmuls, of which attention and the
    SSD consist, on one core whatever their number. To be called before the first computation. It
    changes nothing for accelerators, nor where XLA_FLAGS says how many devices there are.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    count = math.gcd(rows, cores)
    import jax  # here only: `keep_freed_memory` is for programs that may not need it

    jax.config.update("jax_num_cpu_devices", count)
    return count
