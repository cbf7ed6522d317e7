"""Model FLOP utilization (MFU, arXiv 2204.02311): operations of the model over those of the chips.

The operations are those of matrix products in the forward and the backward pass, without
recomputation, as `hnet.flops` counts them for the chunks that were used. The peaks are dense.
"""

from typing import NamedTuple

import jax

from hnet.flops import stage_lengths, training_flops
from hnet.train.config import Config


class Peak(NamedTuple):
    """Operations per second of one chip, from the data sheet of its vendor."""

    bfloat16: float
    float32: float
    """of float32 matrix products at JAX's default precision: one bfloat16 pass on a TPU, TF32 on a
    GPU"""


def _tpu(flops: float) -> Peak:
    return Peak(flops, flops)


# TPUs: docs.cloud.google.com/tpu/docs, page of each version, "peak compute per chip (bf16)". GPUs:
# data sheets of nvidia.com/data-center, tensor cores, half of the figure with sparsity.
PEAKS = {
    "TPU v2": _tpu(45e12),
    "TPU v3": _tpu(123e12),
    "TPU v4": _tpu(275e12),
    "TPU v5 lite": _tpu(197e12),
    "TPU v5e": _tpu(197e12),
    "TPU v5": _tpu(459e12),
    "TPU v5p": _tpu(459e12),
    "TPU v6 lite": _tpu(918e12),
    "TPU v6e": _tpu(918e12),
    "TPU7x": _tpu(2307e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 156e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 156e12),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 156e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 156e12),
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 494.7e12),
    "NVIDIA H100 PCIe": Peak(756e12, 378e12),
    "NVIDIA H200": Peak(989.4e12, 494.7e12),
    "NVIDIA B200": Peak(2250e12, 1125e12),
    "NVIDIA L4": Peak(121e12, 60e12),
    "NVIDIA L40S": Peak(362e12, 183e12),
}
"""kind of a device, as JAX names it -> peak of one chip"""


def peak_of(mesh: jax.sharding.Mesh, dtype: str) -> float | None:
    """Operations per second of all chips of a mesh in this dtype; None if the kind is unknown.

    A TPU chip may be one device or two.
    """
    devices = list(mesh.devices.flat)
    peak = PEAKS.get(devices[0].device_kind)
    chips = {
        (getattr(device, "slice_index", 0), *getattr(device, "coords", (device.id,)))
        for device in devices
    }
    return getattr(peak, dtype) * len(chips) if peak else None


class Utilization:
    """MFU of a run. Make one per start: it traces the model."""

    def __init__(self, config: Config, peak: float):
        """peak: operations per second of all chips."""
        model, seq_len = config.model, config.data.seq_len
        self.peak, self.positions = peak, config.data.batch_size * seq_len
        lengths = stage_lengths(model, seq_len)
        self.per_position_S = [0.0 for _ in lengths]
        for part, cost in training_flops(model, lengths, remat="none").items():
            name = part.partition("/")[0]
            stage = int(name.removeprefix("stage")) if name.startswith("stage") else 0
            self.per_position_S[stage] += cost.matmul / lengths[stage]

    def flops(self, chunks_S: list[float]) -> float:
        """Operations of an update with this number of chunks in each stage that chunks.

        Those of a stage are taken as proportional to its number of positions. Of attention without
        a window, which is not, the share is that of rows with the target number of chunks.
        """
        positions_S = [self.positions, *chunks_S]
        return sum(each * n for each, n in zip(self.per_position_S, positions_S, strict=True))
