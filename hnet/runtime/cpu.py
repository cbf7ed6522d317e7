"""Process settings that make training steps on a CPU faster: malloc and the device count."""

import ctypes
import math
import os
import sys
import threading

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, malloc.h


def use_huge_pages() -> bool:
    """Make glibc's malloc take large blocks in huge pages; returns whether it does.

    XLA allocates the temporaries of a CPU program anew in every call. By default glibc maps and
    unmaps blocks of that size each time, and the kernel clears every page again, which takes a
    fifth of a training step; with huge pages it is a few percent. Where the kernel gives them only
    on request, glibc requests them if an environment variable says so when the process starts: then
    this starts the process again with it, by the same command line and before anything is computed.
    """
    mode = _huge_page_mode()
    if mode == "always" or _HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", ""):
        return mode in ("always", "madvise")
    is_program = threading.active_count() == 1 and not hasattr(sys, "ps1")  # not a notebook's
    if mode != "madvise" or not is_program or _glibc_version() < (2, 35):
        return False
    settings = filter(None, (os.environ.get("GLIBC_TUNABLES"), _HUGE_PAGES))
    environment = os.environ | {"GLIBC_TUNABLES": ":".join(settings)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return False


def _huge_page_mode() -> str:
    """When the kernel gives huge pages: "always", "madvise" (on request), "never", "" (unknown)."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _glibc_version() -> tuple[int, ...]:
    """(0,) for other C libraries."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else (0,)
    except (OSError, ValueError):
        return (0,)


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse freed memory instead of returning it; returns whether it will.

    For programs that do not `use_huge_pages`. Call this before threads are started, that is before
    the first computation. The process keeps its peak memory, and a program whose blocks have
    hundreds of MB takes more: XLA asks for aligned blocks, for which malloc needs up to 96 bytes
    more than was freed, and small blocks come to lie there. With other C libraries nothing changes.
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
