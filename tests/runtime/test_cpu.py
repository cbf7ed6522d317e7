"""What a process sets up for CPUs before it computes; each test uses its own process."""

import math
import os
import subprocess
import sys

import pytest

DEVICES = """
import jax
from hnet.runtime.cpu import one_device_per_core
print(one_device_per_core(6), len(jax.devices()))
"""
FAULTS = """
import ctypes, resource, sys
from hnet.runtime.cpu import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
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


def run(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and "MALLOC" not in k}
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


def test_freed_memory_is_found_mapped_again():
    (kept,), (given_back,) = run(FAULTS, "keep"), run(FAULTS, "")
    if kept == "skip":
        pytest.skip("malloc is not glibc's")
    assert int(kept) < 100 < int(given_back)
