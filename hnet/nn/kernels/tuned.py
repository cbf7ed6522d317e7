"""The file that `experiments.benchmarks.kernels` writes: the fastest kernels of some devices."""

from dataclasses import dataclass

from hnet.bounds import Count
from hnet.errors import ConfigError
from hnet.fields import from_json
from hnet.files import read_json


@dataclass(frozen=True)
class Choice:
    """The fastest implementation of one operation."""

    backend: str
    """value of model.compute.attention_backend or ssd_backend"""
    block_len: Count | None = None
    """positions per block; None: the kernel chooses"""


@dataclass(frozen=True)
class Row:
    """One implementation at one shape; times are medians."""

    field: str
    """field of model.compute: attention_backend or ssd_backend"""
    backend: str
    """value of that field"""
    block_len: Count | None
    """positions per block; None: the kernel chooses"""
    shape: str
    """sizes by letter, and the window of attention: "B=4 L=8192 H=16 K=64 window=1023" """
    layers: Count
    """number of layers with this shape in the configuration"""
    forward_ms: float | None = None
    """time of the forward pass; None if it did not run"""
    both_ms: float | None = None
    """time of the forward and backward pass"""
    error: float | None = None
    """largest error of values and gradients against the reference in float32, relative to the
    largest number of each array"""
    problem: str = ""
    """reason why it is not used; empty if it may be used"""


@dataclass(frozen=True)
class Tuned:
    """Measured times on one kind of device, and the fastest implementations."""

    device_kind: str
    """kind of the devices that were measured"""
    dtype: str
    """model.compute.dtype of the measurement"""
    jax: str
    """version of JAX"""
    config: str
    """words of the command line that name the measured configuration"""
    attention_backend: Choice | None
    """fastest attention; None if no layer attends"""
    ssd_backend: Choice | None
    """fastest SSD; None if no layer has one"""
    rows: tuple[Row, ...]
    """all measurements"""


def read_tuned(path: str, device_kind: str, dtype: str) -> Tuned:
    """Raises ConfigError for a file that is not readable or of other devices or another dtype."""
    tuned = from_json(Tuned, read_json(path, "model.compute.tuned"), "tuned")
    for name, value in (("device_kind", device_kind), ("dtype", dtype)):
        if getattr(tuned, name) != value:
            raise ConfigError(
                f"model.compute.tuned={path!r} was measured with {name} {getattr(tuned, name)!r}, "
                f"and this run has {value!r}: measure with experiments.benchmarks.kernels"
            )
    return tuned
