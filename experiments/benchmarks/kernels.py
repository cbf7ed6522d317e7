"""Times and checks every kernel that these devices can run, at the shapes of a configuration.

    python -m experiments.benchmarks.kernels [NAME] [--out FILE] [--section.field VALUE ...]

NAME and fields are those of `experiments.pretrain`. Measured are the attention and the SSD of every
stage, forward, and forward and backward: by our array code and by each row of the table of kernels
(`hnet.nn.kernels.table`) at several block lengths, with the rows that one device has and the slots
expected at the configured rates; candidates take turns. Values and gradients of a shorter row of
three documents are compared with the reference in float32. The fastest one that is right at all of
its shapes is written to FILE; `--model.compute.tuned FILE` uses it for `auto`.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hnet.command_line import OneLineParser, file_path, number, run
from hnet.config import HNetConfig, StageConfig
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text
from hnet.layout import layout_runs
from hnet.nn.attention import attention_reference
from hnet.nn.kernels.attention_blocks import attention_blocks
from hnet.nn.kernels.ssd_blocks import ssd_blocks
from hnet.nn.kernels.table import KERNELS
from hnet.nn.kernels.tuned import Choice, Row, Tuned
from hnet.nn.ssd import ssd_reference
from hnet.outputs import new_file, write_new
from hnet.train.compiled_run import rows_that_share
from hnet.train.config import Config
from hnet.train.named import run_config

LENGTHS = {"attention_backend": (64, 128, 256, 512, 1024, 2048), "ssd_backend": (32, 64, 128, 256)}
CHECKED = 509  # positions of the row that is compared with the reference
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}  # accelerators also round float32 matmuls


@dataclass(frozen=True)
class Shape:
    """One operation of a configuration."""

    field: str
    """field of model.compute that selects its implementation"""
    sizes: tuple[tuple[str, int], ...]
    """sizes by letter: B, L, H, K and window, or B, L, H, P, N"""

    def size(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    def __str__(self) -> str:
        return " ".join(f"{letter}={size}" for letter, size in self.sizes)


def shapes(config: Config, num_devices: int) -> dict[Shape, int]:
    """Operations on one device, and the number of layers with each."""
    from tpu.aot import capacities

    model, found = config.model, {}
    rows = config.data.batch_size // config.train.accumulate
    num_devices = min(num_devices, rows)
    rows, packed = rows // num_devices, rows_that_share(config, num_devices)
    lengths = (config.data.seq_len, *capacities(config, 1.0))
    for i, (stage, length) in enumerate(zip(model.stages, lengths)):
        outer = {"B": rows // packed, "L": packed * length} if i else {"B": rows, "L": length}
        for kind, count in (each for part in stage.arch_layout for each in layout_runs(part)):
            if inner := _sizes(model, stage, kind):
                field, sizes = inner
                shape = Shape(field, tuple((outer | sizes).items()))
                found[shape] = found.get(shape, 0) + count
    return found


def _sizes(model: HNetConfig, stage: StageConfig, kind: str) -> tuple[str, dict[str, int]] | None:
    """Field and sizes of a layer's operation; None for layers without kernels."""
    if kind.lower() == "m":
        heads = model.ssm.expand * stage.d_model // model.ssm.head_dim
        return "ssd_backend", {"H": heads, "P": model.ssm.head_dim, "N": model.ssm.d_state}
    if kind.lower() == "t":
        sizes = {"H": stage.num_heads, "K": stage.d_model // stage.num_heads}
        return "attention_backend", sizes | {"window": stage.window_size}
    return None


def candidates(shape: Shape, platform: str, dtype: str) -> list[tuple[str, int | None]]:
    """Backends and block lengths, at most one of which is longer than the row."""
    known = LENGTHS[shape.field]
    lengths = [n for n in known if n < 2 * shape.size("L")] or known[:1]
    found: list[tuple[str, int | None]] = [("xla", n) for n in lengths]
    for name, kernel in KERNELS[shape.field].items():
        if kernel.platform == platform and dtype in kernel.dtypes:
            found += [(name, n) for n in (lengths if kernel.block_len else [None])]
    return found


def operation(shape: Shape, backend: str, block_len: int | None) -> Callable[..., jax.Array]:
    """This implementation, as a function of `inputs`."""
    options: dict[str, Any] = {} if block_len is None else {"block_len": block_len}
    if shape.field == "attention_backend":
        kernel = attention_blocks if backend == "xla" else KERNELS[shape.field][backend].run
        return partial(kernel, window=shape.size("window"), **options)
    if backend == "xla":
        return partial(ssd_blocks, **options)
    kernel = KERNELS[shape.field][backend].run
    return lambda x, dt, A, B, C, segments: kernel(
        x, dt, dt * A[None, None], B, C, segments, **options
    )


def reference(shape: Shape) -> Callable[..., jax.Array]:
    if shape.field == "attention_backend":
        return partial(attention_reference, window=shape.size("window"))
    return ssd_reference


def inputs(shape: Shape, dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """Random arrays, and the segment ids of rows of three documents."""
    rng = np.random.default_rng(0)

    def normal(letters: str) -> jax.Array:
        return jnp.asarray(rng.normal(size=[shape.size(n) for n in letters]), dtype)

    B, L, H = (shape.size(letter) for letter in "BLH")
    segments = jnp.asarray(np.broadcast_to(np.arange(L) * 3 // L + 1, (B, L)), jnp.int32)
    if shape.field == "attention_backend":
        return [normal("BLHK") for _ in range(3)], segments
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (B, L, H)))  # as in a new layer
    A = -rng.uniform(1, 16, H)
    arrays = [normal("BLHP"), jnp.asarray(dt, jnp.float32), jnp.asarray(A, jnp.float32)]
    return [*arrays, normal("BLN"), normal("BLN")], segments


def both_ways(function: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """Jitted: the value and the gradients of a weighted sum of it, in float32."""

    def run(arrays, segments):
        def scalar(*arrays):
            out = function(*arrays, segments).astype(jnp.float32)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out * weights), out

        numbers = tuple(range(len(arrays)))
        gradients, out = jax.grad(scalar, numbers, has_aux=True)(*arrays)
        return [a.astype(jnp.float32) for a in (out, *gradients)]

    return jax.jit(run)


def error(shape: Shape, function: Callable[..., jax.Array], dtype: str) -> float:
    """Largest error of values and gradients on a short row, relative to each array's largest."""
    sizes = dict(shape.sizes) | {"B": 1, "L": min(shape.size("L"), CHECKED)}
    short = Shape(shape.field, tuple(sizes.items()))
    ours = both_ways(function)(*inputs(short, dtype))
    exact = _exact(short, dtype)
    errors = [
        float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-9))
        for a, b in zip(ours, exact)
    ]
    return max(math.inf if math.isnan(e) else e for e in errors)


@lru_cache
def _exact(shape: Shape, dtype: str) -> list[jax.Array]:
    arrays, segments = inputs(shape, dtype)
    with jax.default_matmul_precision("highest"):
        return both_ways(reference(shape))([a.astype(jnp.float32) for a in arrays], segments)


def measure(shape: Shape, layers: int, device: jax.Device, dtype: str, rounds: int) -> list[Row]:
    """A row for each candidate; all of them take turns."""
    arrays, segments = jax.device_put(inputs(shape, dtype), device)
    rows, timed = [], []
    for backend, block_len in candidates(shape, device.platform, dtype):
        row = Row(shape.field, backend, block_len, str(shape), layers)
        function = operation(shape, backend, block_len)
        try:
            row = replace(row, error=error(shape, function, dtype))
            if not row.error <= TOLERANCE[dtype]:
                row = replace(row, problem=f"wrong by {row.error:.2g}")
            runs = [jax.jit(lambda a, s, f=function: f(*a, s)), both_ways(function)]
            for each in runs:
                jax.block_until_ready(each(arrays, segments))
            timed.append((len(rows), runs))
        except Exception as e:  # anything that a compiler or device may raise
            row = replace(row, problem=" ".join(f"{type(e).__name__}: {e}".split())[:200])
        rows.append(row)
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        for at, runs in timed:
            for way, each in enumerate(runs):
                began = time.perf_counter()
                jax.block_until_ready(each(arrays, segments))
                seconds.setdefault((at, way), []).append(time.perf_counter() - began)
    for at, _ in timed:
        forward, both = (1e3 * float(np.median(seconds[at, way])) for way in (0, 1))
        rows[at] = replace(rows[at], forward_ms=forward, both_ms=both)
    return rows


def choose(field: str, rows: Sequence[Row]) -> Choice | None:
    """The least time over all layers, of the candidates without a problem at any shape."""
    sums: dict[tuple[str, int | None], float] = {}
    own = [row for row in rows if row.field == field]
    needed = {row.shape for row in own}
    for key in {(row.backend, row.block_len) for row in own}:
        good = [r for r in own if (r.backend, r.block_len) == key and not r.problem]
        if {row.shape for row in good} == needed:
            sums[key] = sum((row.both_ms or 0.0) * row.layers for row in good)
    return Choice(*min(sums, key=sums.__getitem__)) if sums else None


def tune(config: Config, named: str, rounds: int) -> Tuned:
    device, dtype, rows = jax.devices()[0], config.model.compute.dtype, []
    for shape, layers in shapes(config, jax.device_count()).items():
        rows += measure(shape, layers, device, dtype, rounds)
    chosen = {field: choose(field, rows) for field in KERNELS}
    return Tuned(device.device_kind, dtype, jax.__version__, named, **chosen, rows=tuple(rows))


def show(tuned: Tuned) -> None:
    console = Console(highlight=False, width=150)
    columns = ("operation", "shape", "layers", "kernel", "block", "forward ms", "both ms", "error")
    table = Table(*columns, "", box=None)
    for row in tuned.rows:
        times = [f"{t:.2f}" if t is not None else "-" for t in (row.forward_ms, row.both_ms)]
        best = getattr(tuned, row.field)
        mark = "fastest" if best == Choice(row.backend, row.block_len) else row.problem
        table.add_row(
            row.field.removesuffix("_backend"), row.shape, str(row.layers), row.backend,
            str(row.block_len or ""), *times, "-" if row.error is None else f"{row.error:.1g}",
            mark,
        )  # fmt: skip
    console.print(f"{tuned.device_kind}, {tuned.dtype}, JAX {tuned.jax}; medians, in turns")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m experiments.benchmarks.kernels", description=__doc__)
    parser.add_argument("--out", type=file_path, help="file to write; it must not exist")
    parser.add_argument("--rounds", type=number(int, 1, 10**4), default=7, help="default 7")
    options, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if options.out is not None:
        new_file(options.out, "out")
    config = run_config(words)
    tuned = tune(config, " ".join(words), options.rounds)
    if not tuned.rows:
        raise ConfigError("no layer of this network has attention or an SSD: nothing to time")
    show(tuned)
    if options.out is not None:
        write_new(options.out, json_text(to_json(tuned), indent=1) + "\n", "out")
        print(f"use it with --model.compute.tuned {shlex.quote(options.out)}")


if __name__ == "__main__":
    run(main)
