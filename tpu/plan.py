"""Does a run fit on a TPU slice or on GPUs, and what bounds it? Compiles without the hardware.

    python -m tpu.plan NAME --topology v5p:4x4x4 [--search] [--section.field VALUE ...]
    python -m tpu.plan NAME --topology h100:8          (a100, h100, h200, b200, l4; h100:4x8: hosts)

NAME and fields are those of `experiments.pretrain`, for example 1stage_L. It compiles the training
step of that configuration, with libtpu or the CUDA plugin of JAX. It prints memory per device,
FLOPs by part at several boundary rates, collectives, for each part its kernels, HBM traffic and
least time, and the resulting bound on speed: with all chunk slots, with which training starts, and
with the expected slots. `--search` also compiles other settings (rematerialization, micro-batches,
sharding, block lengths) and takes the fastest that fits. Writing machine code takes most of the
time: `--no-code` stops before it; only the compile time and the size of the code are then missing.
Exit codes: 0 fits, 1 does not fit, 2 bad input.
"""

import itertools
import math
import sys
from operator import le
from typing import NamedTuple

from hnet.command_line import OneLineParser, number, parse, run
from hnet.nn.kernels.table import resolved
from hnet.train.config import Config
from hnet.train.named import run_config
from tpu.aot import Plan, capacities, compile_plan
from tpu.chips import open_slice
from tpu.roofline import bytes_per_second, memory, report, size

REMAT = ("none", "dots", "layer")  # each keeps fewer activations than the one before
BLOCKS = {"ssd_block_len": (64, 128, 256), "attention_block_len": (128, 512, 2048)}


class Alternative(NamedTuple):
    """Settings that need less memory: the larger a field, the less."""

    halvings: int
    """number of times the batch is halved; it changes the updates, the other fields do not"""
    remat: int
    accumulate: int
    fsdp: int

    @property
    def slowness(self) -> float:
        return self.remat + math.log2(self.accumulate) + (self.fsdp > 1)

    def options(self, config: Config) -> list[str]:
        words = ["--model.compute.remat", REMAT[self.remat]]
        words += ["--train.accumulate", str(self.accumulate)]
        words += ["--mesh.data", "-1", "--mesh.fsdp", str(self.fsdp), "--mesh.tensor", "1"]
        rows = config.data.batch_size >> self.halvings
        return words + ["--data.batch_size", str(rows)] * (self.halvings > 0)

    def needs_no_less(self, other: "Alternative") -> bool:
        return all(map(le, self, other))


def alternatives(config: Config, num_devices: int) -> list[Alternative]:
    """All that divide batch and devices, ordered by whole batch first, then by speed."""
    rows = config.data.batch_size
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    found = [
        Alternative(*fields)
        for fields in itertools.product(range(3), range(len(REMAT)), (1, 2, 4, 8, 16), divisors)
        if rows % (num_devices * fields[2] << fields[0]) == 0
    ]
    return sorted(found, key=lambda a: (a.halvings, a.slowness, a.fsdp))


class Search:
    """Compiles other settings of a run and keeps those with the highest bound on speed.

    A try must fit with all slots of `plan`; its speed is that with the slots at `rate` times the
    configured boundary rates.
    """

    def __init__(self, plan: Plan, rate: float, limit: int):
        self.plan, self.rate, self.left = plan, rate, limit
        self.best: Plan | None = None
        self.speed = 0.0

    def attempt(self, config: Config, words: list[str]) -> bool:
        """Compile these settings and consider them; whether they fit."""
        self.left -= 1
        config = parse(Config, config, words)
        plan = compile_plan(config, self.plan.slice_, self.plan.capacities, to_code=False)
        speed = self.consider(plan) if plan.fits else 0.0
        fits = f"fits, {speed:,.0f} bytes/s at most" if plan.fits else "too much"
        print(f"  {size(plan.hbm_bytes)}, {fits}: {' '.join(words)}", flush=True)
        return plan.fits

    def consider(self, plan: Plan) -> float:
        """Keep a plan that fits if it is the fastest so far; returns its speed."""
        slots = capacities(plan.config, self.rate)
        expected = compile_plan(plan.config, plan.slice_, slots, to_code=False)
        speed = bytes_per_second(expected) if expected.moved else 0.0
        if self.best is None or speed > self.speed:
            self.best, self.speed = plan, speed
        return speed

    def memory(self) -> None:
        """Search rematerialization, micro-batches and sharding for the largest batch that fits.

        Tries that an earlier try rules out are skipped: a batch that does not fit with the settings
        that need the least memory; settings that need at least as much memory in every respect as
        some that did not fit; and settings that save more memory than some that fit with the same
        rematerialization.
        """
        plan, fitting, failed = self.plan, [], []
        found = alternatives(plan.config, len(plan.slice_.devices))
        for _, group in itertools.groupby(found, lambda a: a.halvings):
            options = list(group)
            for one in [max(options, key=lambda a: a[1:]), *options]:
                if not self.left:
                    return
                state = plan.state_bytes * plan.config.mesh.fsdp / one.fsdp
                is_slower = any(f.remat == one.remat and f.needs_no_less(one) for f in fitting)
                too_much = state > plan.hbm_per_device or any(one.needs_no_less(f) for f in failed)
                if is_slower or too_much:
                    continue
                fits = self.attempt(plan.config, one.options(plan.config))
                (fitting if fits else failed).append(one)
            if fitting:
                return

    def blocks(self) -> None:
        """Search block lengths of what computes in blocks."""
        for field, lengths in BLOCKS.items():
            start = self.best.config
            device = self.plan.slice_.devices[0]
            compute = resolved(start.model.compute, device.platform, device.device_kind)
            if getattr(compute, field) is None:
                continue
            for length in lengths:
                if self.left and length != getattr(compute, field):
                    self.attempt(start, [f"--model.compute.{field}", str(length)])


def search(plan: Plan, rate: float, limit: int) -> Plan | None:
    """The fastest plan found that fits, with at most `limit` tries."""
    found = Search(plan, rate, limit)
    if plan.fits:
        found.consider(plan)
    found.memory()
    if found.best:
        found.blocks()
    return found.best


def advice(plan: Plan) -> str:
    if plan.state_bytes > plan.hbm_per_device:
        needed = math.ceil(plan.state_bytes / (0.7 * plan.hbm_per_device)) * plan.config.mesh.fsdp
        return (
            f"parameters and optimizer are already too much: cut them, --mesh.fsdp {needed} or more"
        )
    return (
        "try --model.compute.remat layer, --train.accumulate 2 or more, --mesh.fsdp, a smaller "
        "--data.batch_size, or more chips; --search tries them"
    )


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tpu.plan", description=__doc__)
    parser.add_argument(
        "--topology", required=True, help="e.g. v5e:4x4, v5p:4x4x4, h100:8, h100:4x8"
    )
    parser.add_argument("--search", action="store_true", help="look for faster settings that fit")
    parser.add_argument(
        "--search-limit",
        type=number(int, 1, 10_000),
        default=16,
        help="settings tried (default 16)",
    )
    parser.add_argument(
        "--rate", type=number(float, 1e-6, 1e6), metavar="F",
        help="only the slots of F times the configured boundary rates; default: all slots, with "
        "which training starts, then those of the configured rates",
    )  # fmt: skip
    parser.add_argument(
        "--no-code", action="store_true", help="stop the compiler when memory is laid out"
    )
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    slice_ = open_slice(options.topology)
    config = run_config(rest)
    first = capacities(config, options.rate or math.inf)
    to_code = not options.no_code
    what = "memory" if options.no_code else "the program"
    print(f"compiling {what} for {options.topology}: some minutes", file=sys.stderr, flush=True)
    plan = compile_plan(config, slice_, first, to_code=to_code)
    print(memory(plan), flush=True)
    later = capacities(config, options.rate or 1.0)
    if not plan.fits:
        print(advice(plan))
        if later != first:
            print("with the slots of the configured rates it would be:")
            print(memory(compile_plan(config, slice_, later, to_code=False)), flush=True)
    if options.search:
        found = search(plan, options.rate or 1.0, options.search_limit)
        print("nothing that was tried fits" if found is None else f"the fastest:\n{memory(found)}")
        plan = found or plan
    if not plan.fits:
        return 1
    if later != first:
        plan = compile_plan(plan.config, slice_, later, to_code=to_code)
        print(memory(plan))
    print(report(plan))
    return 0


if __name__ == "__main__":
    run(main)
