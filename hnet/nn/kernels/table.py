"""The table of kernels: what may compute attention and the SSD in place of our array code."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax

from hnet.config import ComputeConfig
from hnet.errors import ConfigError
from hnet.nn.kernels.cudnn import attention_cudnn
from hnet.nn.kernels.splash import attention_splash
from hnet.nn.kernels.ssd import ssd_pallas


class Kernel(NamedTuple):
    run: Callable[..., jax.Array]
    platform: str
    """of the devices that it runs on"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """of model.compute.dtype"""
    is_default: bool = False
    """where it runs: seen to compile for such devices, and no less exact than our array code"""


# field of ComputeConfig -> its values but "auto" and "xla", which is our own array code
KERNELS: dict[str, dict[str, Kernel]] = {
    "attention_backend": {
        "splash": Kernel(attention_splash, "tpu", is_default=True),
        "cudnn": Kernel(attention_cudnn, "gpu", ("bfloat16",)),
    },
    "ssd_backend": {"pallas": Kernel(ssd_pallas, "tpu", is_default=True)},
}


def resolved(compute: ComputeConfig, platform: str) -> ComputeConfig:
    """`compute` with the backends that devices of `platform` ("cpu", "tpu", "gpu") will use.

    Raises ConfigError for a kernel that these devices do not have.
    """
    return replace(compute, **{f: _resolved(f, compute, platform) for f in KERNELS})


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


def without(compute: ComputeConfig) -> ComputeConfig:
    """`compute` with our own array code, which runs everywhere."""
    return replace(compute, **dict.fromkeys(KERNELS, "xla"))


def kernel(field: str, compute: ComputeConfig) -> Callable[..., jax.Array] | None:
    """What computes in the place of our array code, if anything does."""
    found = KERNELS[field].get(getattr(compute, field))
    return found and found.run


def described(compute: ComputeConfig, platform: str) -> str:
    """One line on resolved backends."""
    used = ", ".join(f"{f.removesuffix('_backend')} {getattr(compute, f)}" for f in KERNELS)
    return f"kernels on {platform}: {used}"
