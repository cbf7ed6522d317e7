"""The training step compiled for a TPU slice that is not there, with libtpu on a CPU."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.flops import stage_lengths
from hnet.train.capacity import Ladder, needed, rung
from hnet.train.config import Config, config_from_json
from hnet.train.program import Program, build
from hnet.train.sharding import batch_sharding
from tpu import hlo

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one chip: docs.cloud.google.com/tpu/docs, a page for each version."""

    hbm: float
    """bytes"""
    flops: float
    """bfloat16 a second"""
    hbm_rate: float
    """bytes a second"""
    link_rate: float
    """bytes a second of one link in one direction: the published interconnect bandwidth of both
    directions over twice the number of links"""
    wraps_at: int
    """an axis of the slice that this divides is a ring, another a line"""


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 5e10, 4),
    "v5e": Chip(16 * GIB, 197e12, 8.19e11, 5e10, 16),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1e11, 4),
    "v6e": Chip(32 * GIB, 918e12, 1.638e12, 1e11, 16),
    "tpu7x": Chip(192 * GIB, 2307e12, 7.38e12, 1e11, 4),
}


@dataclass(frozen=True)
class Slice:
    """A topology and its devices, none of which is present."""

    name: str
    chip: Chip
    devices: list

    @property
    def shape(self) -> tuple[int, ...]:
        """chips along each axis"""
        return tuple(map(int, self.name.split(":")[1].split("x")))

    @property
    def chips_a_device(self) -> float:
        return math.prod(self.shape) / len(self.devices)  # 1/2 where every core is a device

    def network_rate(self, group: int) -> float:
        """Bytes a second that a device can send in a collective over `group` devices.

        The group lies along as few axes as hold it, and all links along those work at once.
        """
        chips, rate = group * self.chips_a_device, 0.0
        for length in sorted(self.shape, reverse=True):
            rings = all(n % 4 == 0 for n in self.shape) if self.chip.wraps_at == 4 else True
            directions = 2 if rings and length % self.chip.wraps_at == 0 else 1
            rate += directions * self.chip.link_rate
            chips /= length
            if chips <= 1:
                break
        return rate * self.chips_a_device


def open_slice(name: str) -> Slice:
    """Raises ConfigError for an unknown topology, or without libtpu."""
    found = re.fullmatch(r"(v4|v5e|v5p|v6e|tpu7x):\d+(x\d+){1,2}", name)
    if not found:
        raise ConfigError(f"topology={name!r}: use KIND:SHAPE such as v5e:4x4, v5p:4x4x4, v6e:2x2")
    # no cloud to ask, other compilers may run beside, and nothing to say about either
    for key, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                       "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
                       "TPU_ACCELERATOR_TYPE": "v5litepod-4",
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
    compile_seconds: float | None
    """None if the compiler was stopped before it wrote machine code"""
    state_bytes: float
    """of parameters and optimizer on the fullest device"""
    hbm_bytes: float
    """that a device needs; at least, if the compiler gave up"""
    fits: bool
    moved: list[hlo.Moved]
    packed_rows: int = 1
    """rows that share a row of slots"""

    @property
    def hbm_a_device(self) -> float:
        return self.slice_.chip.hbm * self.slice_.chips_a_device


FULLEST = 1.2  # what the fullest row of a batch holds, over the mean


def capacities(config: Config, factor: float = math.inf) -> tuple[int, ...]:
    """Slots of a row that training settles on at `factor` times the configured boundary rates.

    The default is all slots, with which training starts. Each row has its own share here, also
    where rows share slots (`train.packed_rows`): such a run needs no more.
    """
    model, L = config.model, config.data.seq_len
    full = Ladder.start(model, L).full
    rates = [min(1.0, factor / s.chunking.target_ratio) for s in model.stages[:-1]]
    lengths = stage_lengths(model, L, rates)[1:]
    fullest = (needed((math.ceil(FULLEST * length),)) for length in lengths)
    return tuple(rung(n, slots) for n, slots in zip(full, fullest))


def compile_plan(
    config: Config, slice_: Slice, slots: tuple[int, ...], *, to_code: bool = True
) -> Plan:
    """Compile the training step. Raises ConfigError for what cannot work on these devices.

    With `to_code` False the compiler is stopped when it has laid out memory, before it writes
    machine code, which takes nearly all of the time and changes nothing that a plan says.
    """
    with tempfile.TemporaryDirectory(prefix="hnet-plan-") as name:
        folder = Path(name)
        program = _program(config, slice_, folder)
        state = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(program.abstract_state))
        packed_rows = program.ladder.packed_rows
        plan = Plan(config, slice_, slots, None, state, math.inf, False, [], packed_rows)
        lowered = _lower(config, program, slots) if to_code else None
        began = time.monotonic()
        try:
            size = _compiled(lowered) if to_code else _laid_out(config, slice_, slots, folder)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return replace(plan, hbm_bytes=_refused_bytes(str(e), state))
        seconds = time.monotonic() - began if to_code else None
        # The text comes from the compiler itself: jaxlib cannot read each program of a newer libtpu
        (text,) = folder.glob("*train_step*.after_optimizations.txt")
        moved, fits = hlo.moved(text.read_text()), size <= plan.hbm_a_device
    return replace(plan, compile_seconds=seconds, hbm_bytes=size, fits=fits, moved=moved)


def _program(config: Config, slice_: Slice, folder: Path) -> Program:
    """The run's program for these devices; the compiler will write what it does into `folder`."""
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    return build(config, devices=slice_.devices, compiler_options=dump)


def _lower(config: Config, program: Program, slots: tuple[int, ...]) -> jax.stages.Lowered:
    shape = (config.data.batch_size, config.data.seq_len)
    kinds = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    kinds |= {"route_ids": jnp.int32} if config.model.num_routes > 1 else {}
    sharding = batch_sharding(program.mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for k, d in kinds.items()}
    capacities = tuple(program.ladder.packed_rows * n for n in slots)
    return program.step.lower(program.abstract_state, batch, program.hparams, capacities=capacities)


def _compiled(lowered: jax.stages.Lowered) -> float:
    """Bytes of HBM that the compiled step needs on a device, its code included."""
    m = lowered.compile().memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return size + m.temp_size_in_bytes + m.generated_code_size_in_bytes


_LAID_OUT = "*train_step*.after_optimizations_after_buffer_assignment.txt"  # the last before code


def _laid_out(config: Config, slice_: Slice, slots: tuple[int, ...], folder: Path) -> float:
    """Bytes of HBM by the compiler's own report, from a process that ends when it is written."""
    job = {"config": to_json(config), "topology": slice_.name, "slots": slots}
    (folder / "job.json").write_text(json.dumps(job))
    with open(folder / "stderr", "w+") as errors:
        command = [sys.executable, "-m", "tpu.aot", str(folder)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=errors, stderr=errors) as compiler:
            try:
                while compiler.poll() is None and not list(folder.glob(_LAID_OUT)):
                    time.sleep(0.1)
            finally:
                compiler.kill()
        if not list(folder.glob(_LAID_OUT)):
            errors.seek(0)
            raise jax.errors.JaxRuntimeError(errors.read())
    (report,) = folder.glob("*train_step*memory-usage-report.txt")
    total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text())
    return float(total[1])


def _main(folder: Path) -> None:
    """Compile the job in `folder`, in a process of its own, which ends with the one it is for."""

    def end_with_parent():
        sys.stdin.read()  # returns when the other end of the pipe is gone
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    config, slice_ = config_from_json(job["config"]), open_slice(job["topology"])
    _lower(config, _program(config, slice_, folder), tuple(job["slots"])).compile()


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


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
