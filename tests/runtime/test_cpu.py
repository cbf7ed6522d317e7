"""What a process sets up for CPUs before it computes; each test uses its own process."""

import math
import os
import subprocess
import sys
import threading

import pytest

from hnet.runtime import cpu

DEVICES = """
import jax
from hnet.runtime.cpu import one_device_per_core
print(one_device_per_core(6), len(jax.devices()))
"""
FAULTS = """
import ctypes, os, resource, sys
from hnet.runtime.cpu import keep_freed_memory, use_huge_pages
ready = {"keep": keep_freed_memory, "huge": use_huge_pages, "": lambda: True}[sys.argv[1]]()
if not ready:
    print("skip")
    sys.exit()
libc, size = ctypes.CDLL(None), 2**26  # more than malloc ever learns to keep by itself
libc.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


STARTED_AGAIN = """
import os, sys, threading
from hnet.runtime import cpu
if sys.argv[1] == "beside a thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
done = cpu.use_huge_pages()
print(int(done), os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""
UNWANTED = ("XLA_FLAGS", "GLIBC_TUNABLES")


def run(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in UNWANTED and "MALLOC" not in k}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_each_core_is_a_device_as_far_as_rows_divide():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run(DEVICES) == [str(math.gcd(6, cores))] * 2


def test_devices_that_a_user_asks_for_stay():
    flags = "--xla_force_host_platform_device_count=5"
    assert run(DEVICES, XLA_FLAGS=flags) == ["0", "5"]


@pytest.mark.parametrize("how", ["keep", "huge"])
def test_freed_memory_is_not_mapped_page_by_page_again(how):
    (ready,), (given_back,) = run(FAULTS, how), run(FAULTS, "")
    if ready == "skip":
        pytest.skip("malloc is not glibc's" if how == "keep" else "no huge pages here")
    if cpu._huge_page_mode() == "always":
        pytest.skip("the kernel gives huge pages to all programs")
    assert int(ready) < int(given_back) / 10


@pytest.mark.skipif(cpu._huge_page_mode() != "madvise", reason="huge pages are not on request")
def test_the_program_starts_again_with_its_arguments_and_the_settings_of_the_user():
    own = "glibc.malloc.tcache_count=3"
    done, pid, tunables, *arguments = run(STARTED_AGAIN, "a b", "", GLIBC_TUNABLES=own)
    assert (done, tunables) == ("1", f"{own}:glibc.malloc.hugetlb=1")
    assert " ".join(arguments) == "['a b', '']"


@pytest.mark.skipif(cpu._huge_page_mode() != "madvise", reason="huge pages are not on request")
def test_a_process_that_runs_more_than_the_program_does_not_start_again():
    done, _, tunables, *_ = run(STARTED_AGAIN, "beside a thread")
    assert (done, tunables) == ("0", "None")


@pytest.mark.parametrize(
    ("mode", "version", "tunables", "wanted"),
    [
        ("always", (2, 31), "", True),
        ("never", (2, 36), "", False),
        ("never", (2, 36), "glibc.malloc.hugetlb=1", False),
        ("", (2, 36), "", False),
        ("madvise", (2, 34), "", False),
        ("madvise", (0,), "", False),
        ("madvise", (2, 36), "glibc.malloc.hugetlb=1", True),
    ],
)
def test_when_a_process_has_huge_pages(monkeypatch, mode, version, tunables, wanted):
    monkeypatch.setattr(cpu, "_huge_page_mode", lambda: mode)
    monkeypatch.setattr(cpu, "_glibc_version", lambda: version)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)

    def refused(*_):
        raise AssertionError("started again")

    monkeypatch.setattr(os, "execve", refused)
    assert cpu.use_huge_pages() is wanted
