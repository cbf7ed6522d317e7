"""Process settings that make training steps on a CPU faster: malloc and the device count."""

import ctypes
import math
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse freed memory instead of returning it; returns whether it will.

    XLA allocates the temporaries of a CPU program anew in every call. By default glibc maps and
    unmaps blocks of that size each time, and the kernel clears every page again, which takes a
    fifth of a training step. Call this before threads are started, that is before the first
    computation. The process then keeps its peak memory. With other C libraries nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) for name, value in settings])


def one_device_per_core(rows: int) -> int:
    """Make JAX see a CPU as several devices that divide `rows` equally; returns their number.

    Each device computes its rows on one core: XLA runs a batch of small matmuls, which attention
    and the SSD consist of, on one core, however many they are. Call this before the first
    computation. It has no effect on accelerators. If XLA_FLAGS sets the number of devices, nothing
    changes and 0 is returned.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    count = math.gcd(rows, cores)
    import jax  # imported late: `keep_freed_memory` is also for programs without JAX

    jax.config.update("jax_num_cpu_devices", count)
    return count
