"""Does a run fit on a TPU slice, and what bounds it? Compiles for it on a machine without a TPU.

    python -m tpu.plan NAME --topology v5p:4x4x4 [--search] [--section.field VALUE ...]

NAME and fields are those of `experiments.pretrain`, or NAME is a published model ("1stage_L"). It
compiles the very training step of that configuration with libtpu and prints memory a chip, FLOPs by
part at several boundary rates, collectives, a roofline of each part, and the speed it bounds: with
all chunk slots, as training starts, and with those it settles on. Writing machine code takes nearly
all of the time: `--no-code` stops before it, and says the same but for the compile time and the
size of the code. Exit codes: 0 fits, 1 does not fit, 2 bad input.
"""

import argparse
import itertools
import math
import sys
from dataclasses import replace
from operator import le
from typing import NamedTuple

from experiments.command_line import base_config, parse, run, run_config
from hnet.config import PUBLISHED, ComputeConfig
from hnet.errors import ConfigError
from hnet.train.config import Config
from tpu.aot import Plan, capacities, compile_plan, open_slice
from tpu.roofline import memory, report, size

REMAT = ("none", "dots", "layer")  # each keeps less than the one before


class Alternative(NamedTuple):
    """Settings that need less memory, each field the less the larger it is."""

    halvings: int
    """of the batch, which changes the updates; the others do not"""
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


def alternatives(config: Config, num_devices: int) -> list[Alternative]:
    """All that divide batch and devices, those of the whole batch first, then the fastest."""
    rows = config.data.batch_size
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    found = [
        Alternative(*fields)
        for fields in itertools.product(range(3), range(len(REMAT)), (1, 2, 4, 8, 16), divisors)
        if rows % (num_devices * fields[2] << fields[0]) == 0
    ]
    return sorted(found, key=lambda a: (a.halvings, a.slowness, a.fsdp))


def search(plan: Plan, limit: int) -> Plan | None:
    """The fastest found that fits, with at most `limit` tries; all make the slots of `plan`.

    What a try rules out is not tried: a batch whose thriftiest settings are too much, and settings
    that need more in every way than some that were too much.
    """
    num_devices, best, failed, tried = len(plan.slice_.devices), None, [], 0
    by_batch = itertools.groupby(alternatives(plan.config, num_devices), lambda a: a.halvings)
    for _, group in by_batch:
        options = list(group)
        for one in [max(options, key=lambda a: a[1:]), *options]:
            if tried == limit or (best and one.slowness >= best[0].slowness):
                return best and best[1]
            state = plan.state_bytes * plan.config.mesh.fsdp / one.fsdp
            if state > plan.hbm_a_device or any(all(map(le, one, f)) for f in failed):
                continue
            words = one.options(plan.config)
            config, tried = parse(Config, plan.config, words), tried + 1
            other = compile_plan(config, plan.slice_, plan.capacities, to_code=False)
            fits = "fits" if other.fits else "too much"
            print(f"  {size(other.hbm_bytes)}, {fits}: {' '.join(words)}", flush=True)
            if other.fits:
                best = (one, other)
            else:
                failed.append(one)
    return best and best[1]


def advice(plan: Plan) -> str:
    if plan.state_bytes > plan.hbm_a_device:
        needed = math.ceil(plan.state_bytes / (0.7 * plan.hbm_a_device)) * plan.config.mesh.fsdp
        return (
            f"parameters and optimizer alone are too much: cut them, --mesh.fsdp {needed} or more"
        )
    return (
        "try --model.compute.remat layer, --train.accumulate 2 or more, --mesh.fsdp, a smaller "
        "--data.batch_size, or more chips; --search tries them"
    )


def plan_config(argv: list[str]) -> Config:
    """As `pretrain` reads it; a published model takes the fields of the default job."""
    if argv and argv[0] in PUBLISHED:
        base = base_config("default")
        compute = ComputeConfig(dtype="bfloat16", remat="layer")
        model = replace(PUBLISHED[argv[0]], compute=compute)
        return parse(Config, replace(base, model=model), argv[1:])
    return run_config(argv)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tpu.plan", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--topology", required=True, help="e.g. v5e:4x4, v5p:4x4x4, v6e:2x2")
    parser.add_argument("--search", action="store_true", help="look for settings that fit")
    parser.add_argument("--search-limit", type=int, default=12, help="compilations (default 12)")
    parser.add_argument(
        "--rate", type=float, metavar="F",
        help="only the slots of F times the configured boundary rates; default: all slots, with "
        "which training starts, then those of the configured rates",
    )  # fmt: skip
    parser.add_argument(
        "--no-code", action="store_true", help="stop the compiler when memory is laid out"
    )
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    slice_ = open_slice(options.topology)
    config = plan_config(rest)
    if options.rate is not None and not options.rate > 0:
        raise ConfigError(f"rate={options.rate}: use a number above 0")
    first = capacities(config, options.rate or math.inf)
    to_code = not options.no_code
    plan = compile_plan(config, slice_, first, to_code=to_code)
    print(memory(plan), flush=True)
    later = capacities(config, options.rate or 1.0)
    if not plan.fits:
        print(advice(plan))
        if later != first:
            print("with the slots of the configured rates it would be:")
            print(memory(compile_plan(config, slice_, later, to_code=False)), flush=True)
        found = search(plan, options.search_limit) if options.search else None
        if options.search and found is None:
            print("nothing that was tried fits")
        if found is None:
            return 1
        plan = found
    if later != first:
        plan = compile_plan(plan.config, slice_, later, to_code=to_code)
        print(memory(plan))
    print(report(plan))
    return 0


if __name__ == "__main__":
    run(main)
