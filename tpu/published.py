"""The published models on whole slices, as a table: what fits, and what bounds the speed.

    python -m tpu.published --topology v5p:4x4x4 v5e:8x8

Each is trained as published, 256 rows of 8192 bytes an update, in bfloat16, layers recomputed, with
parameters and optimizer cut over 16 devices, in the fewest micro-batches that fit with all chunk
slots. Speeds are bounds at the slots of the configured rates (`tpu.plan` says more about each).
Rows are kept in --out as they are found: the same command again goes on behind the last one.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from experiments.command_line import run
from hnet.config import PUBLISHED
from hnet.flops import param_counts
from hnet.train.config import Config
from tpu.aot import GIB, Plan, Slice, capacities, compile_plan, open_slice
from tpu.bundle import code_hash
from tpu.plan import plan_config
from tpu.roofline import bytes_a_second, peak_share, step_bound

ROWS, ROW = 256, 8192  # arXiv 2507.07955, section 3.1
# Of the devices: enough for the largest state, and a group in which libtpu gathers parameters and
# scatters gradients. Over all 64 of a slice it sums zeros instead, for twice the bytes.
FSDP = 16
HEAD = (
    "| model | parameters | slice | micro-batches | GiB a chip: all slots | settled slots "
    "| of | fits | bound | bytes/s at most | of the peak |\n|" + "---|" * 11
)


def published_config(name: str, slice_: Slice, accumulate: int) -> Config:
    words = [name, "--data.seq_len", str(ROW), "--data.batch_size", str(ROWS)]
    config = plan_config([*words, "--train.accumulate", str(accumulate)])
    return replace(config, mesh=replace(config.mesh, data=-1, fsdp=min(FSDP, len(slice_.devices))))


def find(name: str, slice_: Slice) -> tuple[Plan, Plan]:
    """Plans with all slots and with those of the configured rates."""
    accumulate = 1
    while True:
        config = published_config(name, slice_, accumulate)
        full = compile_plan(config, slice_, capacities(config), to_code=False)
        if full.fits or ROWS % (2 * accumulate * len(slice_.devices)):
            break
        accumulate *= 2
    return full, compile_plan(config, slice_, capacities(config, 1.0), to_code=False)


def table_row(name: str, full: Plan, settled: Plan) -> str:
    config, params = full.config, sum(param_counts(full.config.model).values())
    fits = "yes" if full.fits else "settled only" if settled.fits else "no"
    speed = (step_bound(settled), f"{bytes_a_second(settled):,.0f}", f"{peak_share(settled):.0%}")
    cells = [
        name, f"{params / 1e6:,.0f}M", full.slice_.name, config.train.accumulate,
        _gib(full), _gib(settled), f"{full.hbm_a_device / GIB:g}", fits,
        *(speed if settled.moved else ("-",) * 3),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _gib(plan: Plan) -> str:
    return ("" if plan.moved else "over ") + f"{plan.hbm_bytes / GIB:.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tpu.published", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--topology", nargs="+", required=True, help="e.g. v5p:4x4x4 v5e:8x8")
    parser.add_argument("--model", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--out", type=Path, default=Path("runs/plan/published.jsonl"))
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    code, known = code_hash(), {}
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        known = {(r["model"], r["topology"]): r["row"] for r in rows if r["code"] == code}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(HEAD, flush=True)
    for topology in options.topology:
        slice_ = open_slice(topology)
        for name in options.model:
            if (name, topology) not in known:
                row = table_row(name, *find(name, slice_))
                known[name, topology] = row
                line = {"model": name, "topology": topology, "code": code, "row": row}
                with open(options.out, "a") as f:
                    f.write(json.dumps(line) + "\n")
            print(known[name, topology], flush=True)
    return 0


if __name__ == "__main__":
    run(main)
