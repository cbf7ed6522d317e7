"""The table of kernels that can compute attention and the SSD instead of our array code.

`resolved` decides which of them a run uses if its configuration says "auto".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax

from hnet.errors import ConfigError
from hnet.nn.kernels.conv_triton import conv_silu_triton
from hnet.nn.kernels.cudnn import attention_cudnn
from hnet.nn.kernels.gate_triton import gate_norm_triton
from hnet.nn.kernels.splash import attention_splash
from hnet.nn.kernels.ssd import ssd_pallas
from hnet.nn.kernels.ssd_matmul import ssd_matmul
from hnet.nn.kernels.ssd_triton import ssd_triton
from hnet.nn.kernels.tuned import Choice, read_tuned
from hnet.nn.settings import ComputeConfig
from hnet.printable import printable


class Kernel(NamedTuple):
    run: Callable[..., jax.Array]
    platform: str
    """platform of the devices that it runs on"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """values of model.compute.dtype that it supports"""
    is_default: bool = False
    """whether "auto" selects it on its platform, since it compiles there and is at least as exact
    as our array code"""
    block_len: int | None = None
    """positions per block if the configuration sets none; None: the kernel chooses"""
    around: "AroundSSD | None" = None
    """kernels for the rest of Mamba-2; an SSD that has them takes the skip connection's factors"""


class AroundSSD(NamedTuple):
    """Kernels for what precedes and follows the SSD in Mamba-2."""

    conv_silu: Callable[..., jax.Array]
    """instead of `causal_conv_silu`"""
    gate_norm: Callable[..., jax.Array]
    """rms_norm(y silu(z)) scale, of the SSD's output with the skip connection"""


# Field of ComputeConfig -> kernels by value. "auto" and "xla" (our array code) are not listed.
KERNELS: dict[str, dict[str, Kernel]] = {
    "attention_backend": {
        "splash": Kernel(attention_splash, "tpu", is_default=True),
        "cudnn": Kernel(attention_cudnn, "gpu", ("bfloat16",), is_default=True, block_len=2048),
    },
    "ssd_backend": {
        "pallas": Kernel(ssd_pallas, "tpu", is_default=True),
        "matmul": Kernel(ssd_matmul, "gpu", is_default=True, block_len=128),
        "triton": Kernel(
            ssd_triton, "gpu", ("bfloat16",), block_len=64,
            around=AroundSSD(conv_silu_triton, gate_norm_triton),
        ),
    },
}  # fmt: skip
# Positions per block of our array code: large on GPUs, where each operation has a launch cost,
# small on CPUs, where a block should fit into the cache, but larger for the faster products of
# bfloat16 there (experiments/benchmarks/RESULTS.md).
ARRAY_BLOCK_LEN = {
    "attention_backend": {"cpu": 128, "cpu bfloat16": 256, "tpu": 128, "gpu": 1024},
    "ssd_backend": {"cpu": 64, "tpu": 64, "gpu": 128},
}
BLOCK_FIELD = {"attention_backend": "attention_block_len", "ssd_backend": "ssd_block_len"}


def resolved(compute: ComputeConfig, platform: str, device_kind: str = "") -> ComputeConfig:
    """`compute` with the backends and block lengths for `platform` ("cpu", "tpu", "gpu") filled in.

    device_kind: name of the devices; that of `compute.tuned` must be the same. Raises ConfigError
    for a kernel that does not run on this platform or in `compute.dtype`.
    """
    tuned = read_tuned(compute.tuned, device_kind, compute.dtype) if compute.tuned else None
    compute = with_dtypes(compute, platform)
    for field, length in BLOCK_FIELD.items():
        fastest: Choice | None = getattr(tuned, field, None)
        if fastest and fastest.backend not in ("xla", *KERNELS[field]):
            raise ConfigError(
                f"model.compute.tuned={compute.tuned!r} names {field}={fastest.backend!r}: use "
                f"one of xla, {', '.join(KERNELS[field])}"
            )
        if fastest and getattr(compute, field) == "auto":
            compute = replace(compute, **{field: fastest.backend})
        name = _resolved(field, compute, platform)
        block_len = getattr(compute, length)
        if block_len is None and fastest and fastest.backend == name:
            block_len = fastest.block_len
        elif block_len is None and name == "xla":
            lengths = ARRAY_BLOCK_LEN[field]
            how = f"{platform} {compute.inputs}"
            block_len = lengths.get(how) or lengths.get(platform, lengths["cpu"])
        elif block_len is None:
            block_len = KERNELS[field][name].block_len
        compute = replace(compute, **{field: name, length: block_len})
    return compute


def _resolved(field: str, compute: ComputeConfig, platform: str) -> str:
    name, kernels = getattr(compute, field), KERNELS[field]
    if name == "auto":
        fitting = (n for n, k in kernels.items() if k.is_default and k.platform == platform)
        return next((n for n in fitting if compute.dtype in kernels[n].dtypes), "xla")
    if name == "xla":
        return name
    if (needed := kernels[name].platform) != platform:
        raise ConfigError(
            f"model.compute.{field}={name!r} runs on a {needed}, and this run's devices are "
            f"{platform}: use 'auto' or 'xla'"
        )
    if compute.dtype not in (dtypes := kernels[name].dtypes):
        raise ConfigError(
            f"model.compute.{field}={name!r} cannot compute in model.compute.dtype="
            f"{compute.dtype!r}: use --model.compute.dtype {dtypes[0]}, or 'auto'"
        )
    return name


def with_dtypes(compute: ComputeConfig, platform: str) -> ComputeConfig:
    """`compute`, on CPUs with bfloat16 as float32 with rounded matmul inputs.

    CPUs multiply bfloat16 with float32 sums, but convert it to float32 for all else.
    """
    if platform == "cpu" and compute.dtype == "bfloat16":
        return replace(compute, dtype="float32", matmul_inputs="bfloat16")
    return compute


def without(compute: ComputeConfig) -> ComputeConfig:
    """`compute` with our array code, which runs on all platforms."""
    return replace(compute, **dict.fromkeys(KERNELS, "xla"))


def kernel(field: str, compute: ComputeConfig) -> Callable[..., jax.Array] | None:
    """Kernel that is used instead of our array code, or None."""
    found = KERNELS[field].get(getattr(compute, field))
    if found is None:
        return None
    if found.block_len is None:
        return found.run
    return partial(found.run, block_len=getattr(compute, BLOCK_FIELD[field]) or found.block_len)


def around_ssd(compute: ComputeConfig) -> AroundSSD | None:
    """Kernels for the rest of Mamba-2, or None: our array code."""
    found = KERNELS["ssd_backend"].get(compute.ssd_backend)
    return found.around if found else None


def array_block_len(field: str, compute: ComputeConfig) -> int:
    """Positions per block of our array code; if not resolved, the number for a CPU."""
    return getattr(compute, BLOCK_FIELD[field]) or ARRAY_BLOCK_LEN[field]["cpu"]


def described(compute: ComputeConfig, platform: str) -> str:
    """The resolved backends, and on accelerators whether they were timed there."""
    used = ", ".join(f"{f.removesuffix('_backend')} {_shown(f, compute)}" for f in KERNELS)
    inputs = f", matmul inputs {compute.inputs}" if compute.inputs else ""
    line = f"kernels on {platform}: {used}{inputs}"
    if compute.tuned:
        return f"{line}; the fastest by {printable(compute.tuned)}"
    if platform == "cpu":
        return line
    return (
        f"{line}\n         not timed on this hardware: python -m experiments.benchmarks.kernels "
        "measures them, --model.compute.tuned FILE uses the fastest"
    )


def _shown(field: str, compute: ComputeConfig) -> str:
    length = getattr(compute, BLOCK_FIELD[field])
    return getattr(compute, field) + (f" in blocks of {length}" if length else "")
