"""Refuse a run that cannot fit into the memory of its devices before anything is built."""

import math
import os

import jax

from hnet.config_check import approximate_parameters
from hnet.errors import ConfigError
from hnet.train.config import Config

_STATE_BYTES = 8  # per parameter, at least: itself and its gradient in float32


def needed_bytes(config: Config, runs: int = 1) -> float:
    """Lower bound of the memory of one copy of the parameters and of the batch, in bytes."""
    positions = runs * config.data.batch_size * config.data.seq_len
    logits = 4 * positions / config.train.accumulate * config.model.vocab_size
    return runs * _STATE_BYTES * approximate_parameters(config.model) + 4 * positions + logits


def total_bytes(mesh: jax.sharding.Mesh) -> float | None:
    """Memory of all devices of a mesh, in bytes; None if it is unknown, as for a plan."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":  # all devices of a machine share its memory
        machines = len({device.process_index for device in devices})
        return machines * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        stats = mesh.local_devices[0].memory_stats() or {}
    except Exception:  # a device that is only described, by any backend
        return None
    return len(devices) * stats["bytes_limit"] if "bytes_limit" in stats else None


def check_memory(config: Config, mesh: jax.sharding.Mesh, runs: int = 1) -> None:
    """Raise ConfigError if a run needs more memory than all devices have."""
    needed, held = needed_bytes(config, runs), total_bytes(mesh)
    if held is not None and needed > held:
        digits = [f"{size / 2**30:,.1f} GiB" for size in (math.ceil(needed), held)]
        raise ConfigError(
            f"model of {approximate_parameters(config.model):.3g} parameters, data.batch_size="
            f"{config.data.batch_size}, data.seq_len={config.data.seq_len}: this needs at least "
            f"{digits[0]}, but the devices have {digits[1]}: lower d_model, layers or the batch"
        )
