"""The training step compiled for a TPU slice that is not there, with libtpu on a CPU."""

import math
import os
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hnet.config import ConfigError
from hnet.flops import stage_lengths
from hnet.train.capacity import Ladder, rung
from hnet.train.config import Config
from hnet.train.program import build
from hnet.train.sharding import batch_sharding
from tpu import hlo

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one chip: cloud.google.com/tpu/docs, jax-ml.github.io/scaling-book."""

    hbm: float
    """bytes"""
    flops: float
    """bfloat16 a second"""
    hbm_rate: float
    """bytes a second"""
    link_rate: float
    """bytes a second of one interconnect link, both directions"""


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 9e10),
    "v5e": Chip(16 * GIB, 197e12, 8.2e11, 9e10),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1.8e11),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 1.8e11),
    "tpu7x": Chip(192 * GIB, 2307e12, 7.4e12, 1.8e11),
}


@dataclass(frozen=True)
class Slice:
    """A topology and its devices, none of which is present."""

    name: str
    chip: Chip
    devices: list

    @property
    def chips_a_device(self) -> float:
        chips = math.prod(map(int, self.name.split(":")[1].split("x")))
        return chips / len(self.devices)  # 1/2 where every core is a device


def open_slice(name: str) -> Slice:
    """Raises ConfigError for an unknown topology, or without libtpu."""
    found = re.fullmatch(r"(v4|v5e|v5p|v6e|tpu7x):\d+(x\d+){1,2}", name)
    if not found:
        raise ConfigError(f"topology={name!r}: use KIND:SHAPE such as v5e:4x4, v5p:4x4x4, v6e:2x2")
    # no cloud to ask, other compilers may run beside, and nothing to say about either
    for key, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                       "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
                       "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}.items():  # fmt: skip
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # what runs here; no TPU is looked for
    try:
        topology = topologies.get_topology_desc(name, platform="tpu")
    except (RuntimeError, ValueError, NotImplementedError) as e:
        raise ConfigError(
            f"topology={name!r} cannot be compiled for ({str(e).splitlines()[0][:120]}): install "
            "libtpu (the extra tpu), or use another shape"
        ) from None
    return Slice(name, CHIPS[found[1]], list(topology.devices))


@dataclass(frozen=True)
class Plan:
    """One configuration on one slice."""

    config: Config
    slice_: Slice
    capacities: tuple[int, ...]
    compile_seconds: float
    state_bytes: float
    """of parameters and optimizer on the fullest device"""
    hbm_bytes: float
    """that a device needs; at least, if the compiler gave up"""
    fits: bool
    moved: list[hlo.Moved]

    @property
    def hbm_a_device(self) -> float:
        return self.slice_.chip.hbm * self.slice_.chips_a_device


FULLEST = (
    1.2  # slots that training settles on over what a row holds on average, for its fullest row
)


def capacities(config: Config, factor: float = math.inf) -> tuple[int, ...]:
    """Slots of a row that training settles on at `factor` times the configured boundary rates.

    The default is all slots, with which training starts. Rows do not share slots here: a run that
    packs them (`train.packed_rows`) needs no more.
    """
    model, L = config.model, config.data.seq_len
    full = Ladder.start(model, L).full
    rates = [min(1.0, factor / s.chunking.target_ratio) for s in model.stages[:-1]]
    lengths = stage_lengths(model, L, rates)[1:]
    return tuple(rung(n, FULLEST * length) for n, length in zip(full, lengths))


def compile_plan(config: Config, slice_: Slice, slots: tuple[int, ...]) -> Plan:
    """Compile the training step. Raises ConfigError for what cannot work on these devices."""
    with tempfile.TemporaryDirectory(prefix="hnet-plan-") as folder:
        return _compile(config, slice_, slots, Path(folder))


def _compile(config: Config, slice_: Slice, slots: tuple[int, ...], folder: Path) -> Plan:
    # The text comes from the compiler itself: jaxlib cannot read each program of a newer libtpu.
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    program = build(config, devices=slice_.devices, compiler_options=dump)
    shape = (config.data.batch_size, config.data.seq_len)
    kinds = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    kinds |= {"route_ids": jnp.int32} if config.model.num_routes > 1 else {}
    sharding = batch_sharding(program.mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for k, d in kinds.items()}
    state = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(program.abstract_state))
    lowered = program.step.lower(
        program.abstract_state,
        batch,
        program.hparams,
        capacities=tuple(program.ladder.packed_rows * n for n in slots),
    )
    plan = Plan(config, slice_, slots, 0.0, state, math.inf, False, [])
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        size = _refused_bytes(str(e), state)
        return replace(plan, compile_seconds=time.monotonic() - began, hbm_bytes=size)
    seconds = time.monotonic() - began
    m = compiled.memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    size += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    (text,) = folder.glob("*train_step*.after_optimizations.txt")
    moved = hlo.moved(text.read_text())
    fits = size <= plan.hbm_a_device
    return replace(plan, compile_seconds=seconds, hbm_bytes=size, fits=fits, moved=moved)


def _refused_bytes(message: str, state: float) -> float:
    """Least bytes that a program needs which the compiler gave up; inf if it does not say.

    It gives up early for the temporaries alone, or late for everything.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
    if not found:
        return math.inf
    used, used_unit, temporary, unit = found.groups()
    size = float(used or temporary) * 2 ** (10 * " KMGT".index(used_unit or unit))
    return size if used else state + size


def _device_bytes(leaf: Any) -> float:
    size = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return size * jnp.dtype(leaf.dtype).itemsize if not _is_key(leaf) else 8 * size


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
