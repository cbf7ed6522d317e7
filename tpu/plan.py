"""Does a run fit on a TPU slice, and what bounds it? Compiles for it on a machine without a TPU.

    python -m tpu.plan NAME --topology v5p:4x4x4 [--search] [--section.field VALUE ...]

NAME and fields are those of `experiments.pretrain`, or NAME is a published model ("1stage_L"). It
compiles the very training step of that configuration with libtpu and prints memory a chip, FLOPs by
part at several boundary rates, collectives, a roofline of each part, and the speed it bounds: with
all chunk slots, as training starts, and with those it settles on. Exit codes: 0 fits, 1 does not
fit, 2 bad input.
"""

import argparse
import math
import sys
from dataclasses import replace

from experiments.command_line import base_config, parse, run, run_config
from hnet.config import PUBLISHED, ComputeConfig, ConfigError
from hnet.train.config import Config
from tpu.aot import Plan, capacities, compile_plan, open_slice
from tpu.roofline import memory, report, size


def alternatives(config: Config, num_devices: int) -> list[tuple[str, Config]]:
    """Other settings of memory for the same updates, the fastest first, with their options."""
    found = []
    for fsdp in (d for d in range(1, num_devices + 1) if num_devices % d == 0):
        for accumulate in (1, 2, 4, 8, 16):
            if config.data.batch_size % (num_devices * accumulate):
                continue
            for cost, remat in ((0, "none"), (1, "dots"), (2, "layer")):
                model = replace(config.model, compute=replace(config.model.compute, remat=remat))
                changed = replace(
                    config,
                    model=model,
                    train=replace(config.train, accumulate=accumulate),
                    mesh=replace(config.mesh, data=-1, fsdp=fsdp, tensor=1),
                )
                options = f"--model.compute.remat {remat} --train.accumulate {accumulate} "
                options += f"--mesh.data -1 --mesh.fsdp {fsdp} --mesh.tensor 1"
                found.append((cost + math.log2(accumulate) + (fsdp > 1), fsdp, options, changed))
    return [(options, changed) for _, _, options, changed in sorted(found, key=lambda f: f[:2])]


def search(plan: Plan, limit: int) -> Plan | None:
    """The first of at most `limit` alternatives that fits, compiled one after the other."""
    tried = 0
    for options, config in alternatives(plan.config, len(plan.slice_.devices)):
        share = plan.state_bytes * plan.config.mesh.fsdp / config.mesh.fsdp
        if share > plan.hbm_a_device or config == plan.config:
            continue
        if tried == limit:
            break
        tried += 1
        other = compile_plan(config, plan.slice_, plan.capacities)
        fits = "fits" if other.fits else "too much"
        print(f"  {size(other.hbm_bytes)}, {fits}: {options}", flush=True)
        if other.fits:
            return other
    return None


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
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    slice_ = open_slice(options.topology)
    config = plan_config(rest)
    if options.rate is not None and not options.rate > 0:
        raise ConfigError(f"rate={options.rate}: use a number above 0")
    first = capacities(config, options.rate or math.inf)
    plan = compile_plan(config, slice_, first)
    print(memory(plan), flush=True)
    if not plan.fits:
        print(advice(plan))
        found = search(plan, options.search_limit) if options.search else None
        if options.search and found is None:
            print("nothing that was tried fits")
        if found is None:
            return 1
        plan = found
    later = capacities(plan.config, options.rate or 1.0)
    if later != first:
        plan = compile_plan(plan.config, slice_, later)
        print(memory(plan))
    print(report(plan))
    return 0


if __name__ == "__main__":
    run(main)
