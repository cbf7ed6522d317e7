"""Compiles the training step on a CPU, for a slice that is not present."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from hnet.chunking.slots import bucket
from hnet.fields import to_json
from hnet.flops import stage_lengths
from hnet.train.capacity import CapacitySchedule, needed
from hnet.train.compiled_run import CompiledRun, build
from hnet.train.config import Config, config_from_json
from hnet.train.sharding import batch_sharding
from tpu import hlo
from tpu.chips import Slice, assumed_cudnn, open_slice


@dataclass(frozen=True)
class Plan:
    """One configuration compiled for one slice."""

    config: Config
    slice_: Slice
    capacities: tuple[int, ...]
    compile_seconds: float | None
    """compile time; None if the compiler was stopped before it wrote machine code"""
    state_bytes: float
    """bytes of parameters and optimizer state on the fullest device"""
    hbm_bytes: float
    """bytes of HBM that a device needs; a lower bound if the compiler gave up"""
    fits: bool
    moved: list[hlo.Traffic]
    rows_sharing_slots: int = 1
    """number of rows that share a row of slots"""

    @property
    def hbm_per_device(self) -> float:
        return self.slice_.chip.hbm * self.slice_.chips_a_device


FULLEST = 1.2  # chunks of the fullest row of a batch, over the mean


def capacities(config: Config, factor: float = math.inf) -> tuple[int, ...]:
    """Expected slots per row in training at `factor` times the configured boundary rates.

    The default is all slots, with which training starts (with fewer if a rule makes the
    boundaries). The slots are per row even if rows share slots (`train.rows_sharing_slots`): such a
    run needs no more.
    """
    model, L = config.model, config.data.seq_len
    full = CapacitySchedule.start(model, L).full
    rates = [min(1.0, factor / s.chunking.target_ratio) for s in model.stages[:-1]]
    lengths = stage_lengths(model, L, rates)[1:]
    fullest = (needed((math.ceil(FULLEST * length),)) for length in lengths)
    return tuple(bucket(n, slots) for n, slots in zip(full, fullest))


def compile_plan(
    config: Config, slice_: Slice, slots: tuple[int, ...], *, to_code: bool = True
) -> Plan:
    """Compile the training step. Raises ConfigError for settings that cannot work on these devices.

    With `to_code` False the compiler is stopped after it has laid out memory and before it writes
    machine code. Writing code takes nearly all of the time and does not change the other figures of
    a plan.
    """
    with tempfile.TemporaryDirectory(prefix="hnet-plan-") as name:
        folder = Path(name)
        program = _program(config, slice_, folder)
        state = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(program.abstract_state))
        rows_sharing_slots = program.ladder.rows_sharing_slots
        plan = Plan(config, slice_, slots, None, state, math.inf, False, [], rows_sharing_slots)
        lowered = _lower(config, slice_, program, slots) if to_code else None
        began = time.monotonic()
        try:
            size = _compiled(lowered) if to_code else _laid_out(config, slice_, slots, folder)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return replace(plan, hbm_bytes=_refused_bytes(str(e), state))
        seconds = time.monotonic() - began if to_code else None
        # Use the compiler's own text: jaxlib cannot read every program of a newer libtpu.
        (text,) = folder.glob("*train_step*[._]after_optimizations.txt")
        moved, fits = hlo.moved(text.read_text()), size <= plan.hbm_per_device
    return replace(plan, compile_seconds=seconds, hbm_bytes=size, fits=fits, moved=moved)


def _program(config: Config, slice_: Slice, folder: Path) -> CompiledRun:
    """The run's program for these devices; the compiler dumps its output to `folder`."""
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    return build(config, devices=slice_.devices, compiler_options=dump)


def _lower(
    config: Config, slice_: Slice, program: CompiledRun, slots: tuple[int, ...]
) -> jax.stages.Lowered:
    shape = (config.data.batch_size, config.data.seq_len)
    kinds = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    kinds |= {"route_ids": jnp.int32} if config.model.num_routes > 1 else {}
    sharding = batch_sharding(program.mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for k, d in kinds.items()}
    capacities = tuple(program.ladder.rows_sharing_slots * n for n in slots)
    inputs = (program.abstract_state, batch, program.hparams)
    with assumed_cudnn(slice_):
        return program.step.lower(*inputs, capacities=capacities)


def _compiled(lowered: jax.stages.Lowered) -> float:
    """Bytes of HBM that the compiled step needs per device, including its code."""
    with _without_cache():
        m = lowered.compile().memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return size + m.temp_size_in_bytes + m.generated_code_size_in_bytes


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turn the compilation cache off: JAX cannot load a program of a device that is not present."""
    before = jax.config.jax_enable_compilation_cache
    try:
        _set_cache(False)
        yield
    finally:
        _set_cache(before)


def _set_cache(is_enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", is_enabled)
    compilation_cache.reset_cache()  # JAX reads the setting once


# Last dump of the compiler before machine code, which takes most of the time.
_LAID_OUT = {
    False: "*train_step*.after_optimizations_after_buffer_assignment.txt",
    True: "*train_step*memory-usage-report.txt",
}  # key: whether the target is a GPU
_TOTAL = r"Memory Space: default .*\nTotal bytes: (\d+)\D"


def _laid_out(config: Config, slice_: Slice, slots: tuple[int, ...], folder: Path) -> float:
    """Bytes of HBM by the compiler's own report; its process is ended once that is written."""
    last = _LAID_OUT[slice_.is_gpu]
    job = {"config": to_json(config), "topology": slice_.name, "slots": slots}
    (folder / "job.json").write_text(json.dumps(job))
    with open(folder / "stderr", "w+") as errors:
        command = [sys.executable, "-m", "tpu.aot", str(folder)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=errors, stderr=errors) as compiler:
            try:
                while compiler.poll() is None and not _is_written(folder, last):
                    time.sleep(0.1)
            finally:
                compiler.kill()
        if not list(folder.glob(last)):
            errors.seek(0)
            raise jax.errors.JaxRuntimeError(errors.read())
    (report,) = folder.glob("*train_step*memory-usage-report.txt")
    return float(re.search(_TOTAL, report.read_text())[1])


def _is_written(folder: Path, pattern: str) -> bool:
    """Whether the compiler has written `pattern` and the part of its memory report that is read."""
    reports = [f.read_text() for f in folder.glob("*train_step*memory-usage-report.txt")]
    return any(folder.glob(pattern)) and any(re.search(_TOTAL, text) for text in reports)


def _main(folder: Path) -> None:
    """Compile the job in `folder`, in a separate process that ends with its parent."""

    def end_with_parent():
        sys.stdin.read()  # returns when the other end of the pipe is closed
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    config, slice_ = config_from_json(job["config"]), open_slice(job["topology"])
    program = _program(config, slice_, folder)
    _lower(config, slice_, program, tuple(job["slots"])).compile()


def _refused_bytes(message: str, state: float) -> float:
    """Lower bound on the bytes of a program that the compiler gave up; inf if it does not say.

    The compiler gives up early because of the temporaries, or late because of the total.
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
