"""Plans of the published models on whole slices and GPU hosts, as a table.

    python -m tpu.published --topology v5p:4x4x4 v5e:8x8 --remat dots
    python -m tpu.published --topology h100:8 b200:8 --remat dots --model.compute.ssd_backend triton

Each is trained as published, 256 rows of 8192 bytes per update, in bfloat16, with parameters and
optimizer sharded over 16 devices (fewer if there are fewer), in the fewest micro-batches that fit
with all chunk slots, and with the `remat` that is then the fastest (of those named by --remat).
Other words are fields of the configuration, as in `experiments.pretrain`. Speeds are bounds with
the slots at the configured rates (`tpu.plan` gives more detail). Rows are written to --out as they
are found: the same command again continues after the last whole one.
"""

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hnet.command_line import OneLineParser, file_path, run
from hnet.config import PUBLISHED
from hnet.errors import ConfigError
from hnet.files import json_text, parse_json, read_bytes
from hnet.flops import param_counts
from hnet.outputs import local_folder, lock
from hnet.train.config import Config
from hnet.train.named import run_config
from tpu.aot import Plan, capacities, compile_plan
from tpu.bundle import code_hash
from tpu.chips import GIB, Slice, open_slice
from tpu.plan import REMAT
from tpu.roofline import bytes_per_second, hbm_per_byte, kernels, peak_share, step_bound

ROWS, ROW = 256, 8192  # arXiv 2507.07955, section 3.1
# fsdp devices: enough for the largest state, and a group in which libtpu gathers parameters and
# scatters gradients. Over all 64 of a slice it sums zeros instead, which moves twice the bytes.
FSDP = 16
FIELDS = ("model", "topology", "code", "how", "row")  # in each line of the file
START = b'{"model": "'
HEAD = (
    "| model | parameters | slice | remat | micro-batches | GiB per chip: all slots | expected "
    "slots | of | fits | kernels | HBM MB per byte | bound | bytes/s at most | of the peak |\n"
    f"|{'---|' * 14}"
)


def published_config(name: str, slice_: Slice, words: list[str], accumulate: int) -> Config:
    first = [name, "--data.seq_len", str(ROW), "--data.batch_size", str(ROWS)]
    config = run_config([*first, *words, "--train.accumulate", str(accumulate)])
    return replace(config, mesh=replace(config.mesh, data=-1, fsdp=min(FSDP, len(slice_.devices))))


def find(
    name: str, slice_: Slice, remats: Sequence[str] = REMAT, words: Sequence[str] = ()
) -> tuple[Plan, Plan]:
    """(plan with all slots, plan with those at the configured rates) of the fastest that fits."""
    settings = [["--model.compute.remat", remat, *words] for remat in remats]
    found = [fewest_micro_batches(name, slice_, each) for each in settings]
    pairs = [(full, _expected(full)) for full in found if full.fits] or [
        (full, _expected(full)) for full in found[-1:]
    ]
    return max(pairs, key=lambda pair: bytes_per_second(pair[1]) if pair[1].moved else 0.0)


def _expected(full: Plan) -> Plan:
    slots = capacities(full.config, 1.0)
    return compile_plan(full.config, full.slice_, slots, to_code=False)


def fewest_micro_batches(name: str, slice_: Slice, words: list[str]) -> Plan:
    """The plan with all slots that fits, else the one with the most micro-batches possible."""
    accumulate, most = 1, ROWS // len(slice_.devices)
    while True:
        config = published_config(name, slice_, words, accumulate)
        full = compile_plan(config, slice_, capacities(config), to_code=False)
        if full.fits or accumulate == most:
            return full
        room = full.hbm_per_device - full.state_bytes
        needed = (full.hbm_bytes - full.state_bytes) / room if room > 0 else math.inf
        while accumulate < most and needed > 1:  # all but the state is about proportional to rows
            accumulate, needed = 2 * accumulate, needed / 2


def table_row(name: str, full: Plan, expected: Plan) -> str:
    config, params = full.config, sum(param_counts(full.config.model).values())
    fits = "yes" if full.fits else "expected only" if expected.fits else "no"
    speed = (
        f"{kernels(expected):,.0f}", f"{hbm_per_byte(expected) / 1e6:.1f}", step_bound(expected),
        f"{bytes_per_second(expected):,.0f}", f"{peak_share(expected):.0%}",
    )  # fmt: skip
    cells = [
        name, f"{params / 1e6:,.0f}M", full.slice_.name,
        config.model.compute.remat, config.train.accumulate,
        _gib(full), _gib(expected), f"{full.hbm_per_device / GIB:.3g}", fits,
        *(speed if expected.moved else ("-",) * 5),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _gib(plan: Plan) -> str:
    return ("" if plan.moved else "over ") + f"{plan.hbm_bytes / GIB:.1f}"


def _read_rows(out: Path) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """(rows of the file of an earlier start, what a killed one left of its last line, line end that
    the last row lacks). Raises ConfigError for another file."""
    row = lambda line: {name: parse_json(line)[name] for name in FIELDS}
    try:
        *whole, torn = read_bytes(out).split(b"\n")
        rows = [row(line) for line in whole]
        with contextlib.suppress(ValueError, KeyError, TypeError):  # only its line end is missing
            return [*rows, row(torn)], b"", b"\n"
        if torn and not (rows or torn.startswith(START) or START.startswith(torn)):
            raise ValueError("its only line is of another form")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"out={str(out)!r} holds no rows of this command: {e}") from None
    return rows, torn, b""


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tpu.published", description=__doc__)
    parser.add_argument("--topology", nargs="+", required=True, help="e.g. v5p:4x4x4 h100:8")
    parser.add_argument("--model", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--out", type=file_path, default="runs/plan/published.jsonl")
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=REMAT, help="default: all")
    options, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    out = local_folder(options.out, "out", ending=1)
    run_config([options.model[0], *words])  # refuse bad words before anything is compiled
    code, how = code_hash(), " ".join((*options.remat, *words))

    def known(rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
        same = [row for row in rows if (row["code"], row["how"]) == (code, how)]
        return {(row["model"], row["topology"]): row["row"] for row in same}

    found = known(_read_rows(out)[0]) if os.path.lexists(out) else {}
    print(HEAD, flush=True)
    with contextlib.ExitStack() as stack:
        file = None
        for topology in options.topology:
            slice_ = open_slice(topology)
            for name in options.model:
                if (name, topology) not in found and file is None:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(open(out, "ab"))
                    lock(file, f"out={str(out)!r}")
                    rows, torn, end = _read_rows(out)  # another start may have added some
                    found = known(rows)
                if (name, topology) not in found:
                    row = table_row(name, *find(name, slice_, options.remat, words))
                    found[name, topology] = row
                    line = {
                        "model": name, "topology": topology, "code": code, "how": how, "row": row,
                    }  # fmt: skip
                    if torn:
                        file.truncate(file.tell() - len(torn))
                    file.write(end + json_text(line).encode() + b"\n")
                    file.flush()
                    torn = end = b""
                print(found[name, topology], flush=True)
    return 0


if __name__ == "__main__":
    run(main)
