"""Parameters and floating-point operations of a network, from its traced program.

Parameters are counted in the abstract model and operations in its jaxpr (`hnet.cost`), both per
named part. The counts are for one row of one segment: our array code, also if a run uses a kernel
instead; all chunk slots, used or not; the attention blocks that are visited.
`hnet.flops_published` uses the conventions of papers.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.config import HNetConfig
from hnet.cost import Cost, count
from hnet.errors import ConfigError
from hnet.loss import next_byte_nll
from hnet.model import abstract
from hnet.nn.kernels.table import without


def param_counts(config: HNetConfig) -> dict[str, int]:
    """Number of parameters of each part; they add up to those of the model."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)[1]):
        part = part_of([str(key.key) for key in path], config.num_chunked)
        counts[part] = counts.get(part, 0) + leaf.size
    return counts


def part_of(path: list[str], num_chunked: int) -> str:
    """Part of the network that a parameter belongs to: `stage1/encoder` for
    `["backbone", "main_network", "encoder", ...]`."""
    if path[0] != "backbone":
        return path[0]
    stage = 0
    while stage < num_chunked and path[stage + 1] == "main_network":
        stage += 1
    return f"stage{stage}/{path[stage + 1]}"


def stage_lengths(
    config: HNetConfig, seq_len: int, boundary_rates: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Mean number of positions of each stage for a row of `seq_len` bytes, outermost first.

    boundary_rates: chunks per position in each stage that chunks; default: the configured
    1 / target_ratio. Raises ConfigError for a rate outside (0, 1] or a wrong number of rates.
    """
    cutting = config.stages[: config.num_chunked]
    if boundary_rates is None:
        boundary_rates = tuple(1 / stage.chunking.target_ratio for stage in cutting)
    if len(boundary_rates) != len(cutting) or not all(0 < rate <= 1 for rate in boundary_rates):
        needed = f"give each of the {len(cutting)} stages that cut a rate above 0 and up to 1"
        raise ConfigError(f"boundary_rates={boundary_rates!r}: {needed}")
    return tuple(seq_len * math.prod(boundary_rates[:s]) for s in range(len(config.stages)))


def check_lengths(config: HNetConfig, lengths: tuple[float, ...]) -> None:
    """Raise ConfigError if there is not one length per stage."""
    if len(lengths) != len(config.stages):
        raise ConfigError(f"lengths={lengths!r}: give each of the {len(config.stages)} stages one")


def forward_flops(
    config: HNetConfig, lengths: tuple[float, ...], rows_sharing_slots: int = 1
) -> dict[str, Cost]:
    """Operations of each part in the forward pass, per row.

    lengths: bytes per row, then slots per row of each inner stage (`stage_lengths`, or capacities);
    rounded up. rows_sharing_slots: number of rows that share slots, which inner stages see as one
    long row.
    """
    return dict(_flops(config, tuple(map(math.ceil, lengths)), rows_sharing_slots, False))


def training_flops(
    config: HNetConfig,
    lengths: tuple[float, ...],
    rows_sharing_slots: int = 1,
    *,
    remat: str | None = None,
    kernels: bool = False,
) -> dict[str, Cost]:
    """Operations of each part in the forward and backward pass, recomputation included, per row.

    The loss is cross-entropy. The optimizer is not counted: its cost is per update, not per row.
    Arguments as in `forward_flops`; remat: overrides `compute.remat`; kernels: count the Pallas
    kernels for GPUs that the configuration names, instead of our array code.
    """
    if remat is not None:
        config = replace(config, compute=replace(config.compute, remat=remat))
    return dict(_flops(config, tuple(map(math.ceil, lengths)), rows_sharing_slots, True, kernels))


@functools.lru_cache(maxsize=256)
def _flops(
    config: HNetConfig,
    lengths: tuple[int, ...],
    rows_sharing_slots: int,
    training: bool,
    kernels: bool = False,
) -> tuple[tuple[str, Cost], ...]:
    check_lengths(config, lengths)
    plain = replace(config, compute=without(config.compute))
    if kernels and config.compute.ssd_backend == "triton":
        plain = replace(plain, compute=replace(plain.compute, ssd_backend="triton"))
    graph, params = abstract(plain)
    capacities = tuple(rows_sharing_slots * slots for slots in lengths[1:])

    def loss(params, ids_BL):
        logits_BLV, _ = nnx.merge(graph, params)(
            ids_BL, capacities=capacities, rows_sharing_slots=rows_sharing_slots,
            route_ids_BL=jnp.zeros_like(ids_BL), boundaries_BL=ids_BL == 0,
        )  # fmt: skip
        if not training:
            return logits_BLV
        with jax.named_scope("loss"):
            return jnp.mean(next_byte_nll(logits_BLV, ids_BL))

    ids_BL = jax.ShapeDtypeStruct((rows_sharing_slots, lengths[0]), jnp.int32)
    parts = count(jax.value_and_grad(loss) if training else loss, params, ids_BL)
    return tuple((part, cost * (1 / rows_sharing_slots)) for part, cost in parts.items())


def total(parts: dict[str, Cost]) -> float:
    """Operations of all parts."""
    return sum(cost.total for cost in parts.values())
