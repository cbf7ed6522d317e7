"""Chips and slices to compile for without having them: TPUs by libtpu, GPUs by JAX's plugin.

`open_slice("v5p:4x4x4")` is 64 TPU chips, `open_slice("h100:8")` one host of 8 GPUs and
`open_slice("h100:4x8")` four of them.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hnet.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one TPU chip (docs.cloud.google.com/tpu/docs) or of one GPU."""

    hbm: float
    """bytes of HBM"""
    flops: float
    """bfloat16 operations per second, dense"""
    hbm_rate: float
    """bytes per second from and to HBM"""
    link_rate: float
    """bytes per second in one direction. TPU: of one link, i.e. the published interconnect
    bandwidth of both directions over twice the number of links. GPU: of all links in the host"""
    wraps_at: int = 1
    """TPU: number of chips; an axis of the slice divisible by it is a ring, any other a line"""
    float32_slowness: float = 6.0
    """ratio of the time of a full float32 matmul to a bfloat16 one (a TPU makes six passes)"""
    host_rate: float = 0.0
    """GPU: bytes per second to other hosts, through the GPU's own network adapter"""
    launch: float = 0.0
    """least seconds per kernel, however small it is"""


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 5e10, 4),
    "v5e": Chip(16 * GIB, 197e12, 8.19e11, 5e10, 16),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1e11, 4),
    "v6e": Chip(32 * GIB, 918e12, 1.638e12, 1e11, 16),
    "tpu7x": Chip(192 * GIB, 2307e12, 7.38e12, 1e11, 4),
}


class Gpu(NamedTuple):
    """Properties that XLA's compiler queries from a GPU, and its data sheet
    (nvidia.com/data-center)."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    """bytes of memory that the driver offers"""
    l2: int
    clock_ghz: float
    shared: tuple[int, int]
    """bytes of shared memory: per core, and at most per block"""
    threads: int
    """maximum number of threads per core"""
    flops: float
    float32_flops: float
    hbm_rate: float
    link_rate: float
    host_rate: float


LAUNCH = 2e-6  # seconds; small kernels in a queue were measured at 2 to 4 microseconds each
_HOPPER = ((9, 0), 132), (50 * 2**20, 1.98, (233472, 232448), 2048, 989.4e12, 66.9e12)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85100068864, 40 * 2**20, 1.41,
                (167936, 166912), 2048, 312e12, 19.5e12, 2.039e12, 3e11, 2.5e10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *_HOPPER[0], 84942979072, *_HOPPER[1], 3.35e12, 4.5e11,
                5e10),
    "h200": Gpu("NVIDIA H200", *_HOPPER[0], 151397597184, *_HOPPER[1], 4.8e12, 4.5e11, 5e10),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191514411008, 126 * 2**20, 1.965, (233472, 232448),
                2048, 2250e12, 75e12, 7.7e12, 9e11, 5e10),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 23609475072, 48 * 2**20, 2.04, (102400, 101376), 1536,
              121e12, 30.3e12, 3e11, 3.2e10, 1.25e10),
}  # fmt: skip
CHIPS |= {
    kind: Chip(
        gpu.memory, gpu.flops, gpu.hbm_rate, gpu.link_rate, host_rate=gpu.host_rate, launch=LAUNCH,
        float32_slowness=gpu.flops / gpu.float32_flops,
    )
    for kind, gpu in GPUS.items()
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A topology and its devices, which are not present."""

    name: str
    chip: Chip
    devices: list

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def platform(self) -> str:
        return "gpu" if self.is_gpu else "tpu"

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis; for GPUs (hosts, GPUs per host), or only the latter."""
        return tuple(map(int, self.name.split(":")[1].split("x")))

    @property
    def chips_a_device(self) -> float:
        return math.prod(self.shape) / len(self.devices)  # 1/2 if every core is a device

    def network_rate(self, group: int, span: int = 0) -> float:
        """Bytes per second that a device can send in a collective over `group` devices.

        span: range of the device numbers in the group; default: consecutive numbers. A group of
        TPUs spans the fewest axes that can hold it, and all links along those axes work at once.
        GPUs on one host use its links; a ring over several hosts is as slow as its slowest part.
        """
        if self.is_gpu:
            is_one_host = max(group, span) <= self.shape[-1]
            return self.chip.link_rate if is_one_host else self.chip.host_rate
        chips, rate = group * self.chips_a_device, 0.0
        for length in sorted(self.shape, reverse=True):
            rings = all(n % 4 == 0 for n in self.shape) if self.chip.wraps_at == 4 else True
            directions = 2 if rings and length % self.chip.wraps_at == 0 else 1
            rate += directions * self.chip.link_rate
            chips /= length
            if chips <= 1:
                break
        return rate * self.chips_a_device


TPU_KINDS = tuple(kind for kind in CHIPS if kind not in GPUS)


def open_slice(name: str) -> Slice:
    """The slice of this name. Raises ConfigError if it is unknown or its compiler is missing."""
    tpu = rf"({'|'.join(TPU_KINDS)}):[1-9]\d{{0,3}}(x[1-9]\d{{0,3}}){{1,2}}"
    gpu = rf"({'|'.join(GPUS)}):([1-9]\d{{0,3}}x)?[1-9]\d{{0,2}}"
    found = re.fullmatch(tpu, name) or re.fullmatch(gpu, name)
    if not found:
        raise ConfigError(
            f"topology={name!r}: use KIND:SHAPE such as v5e:4x4, v5p:4x4x4, v6e:2x2, or "
            f"{', '.join(GPUS)} with GPUs per host (h100:8) or hosts too (h100:4x8)"
        )
    is_gpu, kind = found[1] in GPUS, found[1]
    # Keep libtpu from querying GCP metadata, allow several compilers at once, silence the logs.
    for key, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                       "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
                       "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TF_CPP_MIN_LOG_LEVEL": "3",
                       "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}.items():  # fmt: skip
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # do not search for accelerators
    try:
        devices = _gpus(name) if is_gpu else topologies.get_topology_desc(name, "tpu").devices
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        packages = "jax-cuda12-plugin and jax-cuda12-pjrt (the extra cuda12)"
        raise ConfigError(
            f"topology={name!r} cannot be compiled for ({first[:120]}): install "
            f"{packages if is_gpu else 'libtpu (the extra tpu)'}, or use another shape"
        ) from None
    return Slice(name, CHIPS[kind], list(devices))


def _gpus(name: str) -> list:
    kind, shape = name.split(":")
    hosts, _, per_host = shape.rpartition("x")
    target = _target(GPUS[kind])
    # XLA's shape of a topology: slices x hosts of a slice x devices of a host
    shape = f"1x{hosts or 1}x{per_host}"
    with _silent():
        found = topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=target)
    return found.devices


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence C++ libraries that write, as they are loaded, that no GPU was found."""
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _target(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    of_core, of_block = gpu.shared
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {of_core}
      shared_memory_per_block_optin: {of_block}
      core_count: {gpu.cores} fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
      clock_rate_ghz: {gpu.clock_ghz} memory_bandwidth: {int(gpu.hbm_rate)}
      l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{gpu.name}"
    """


@contextlib.contextmanager
def assumed_cudnn(slice_: Slice) -> Iterator[None]:
    """Trace for the GPUs of `slice_`: JAX would otherwise query the cuDNN and GPU present here."""
    if not slice_.is_gpu:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as fused

    capability = GPUS[slice_.kind].capability
    assumed = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda s: tuple(map(int, s.split("."))) <= capability,
        "is_cuda_compute_capability_equal": lambda s: tuple(map(int, s.split("."))) == capability,
    }
    present = {name: getattr(fused, name) for name in assumed}
    try:
        for name, function in assumed.items():
            setattr(fused, name, function)
        yield
    finally:
        for name, function in present.items():
            setattr(fused, name, function)
