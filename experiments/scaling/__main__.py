"""Do the models stay apart as they grow? A ladder of sizes at matched FLOPs per byte.

    python -m experiments.scaling plan --out DIR --levels 256 512 1024 [--bpe 8192 | --tokenizer F]
                                       [--topology v5e:4x4] [NAME] [--section.field VALUE ...]
    python -m experiments.scaling run --out DIR [--only NAME ...]
    python -m experiments.scaling fit --out DIR

`plan` runs nothing. It writes DIR/plan.json, a table, and a configuration for `pretrain` per model
(DIR/configs/NAME.json): a Transformer over BPE tokens, one over bytes, and H-Nets of 1 and of 2
stages (`experiments/scaling/ladder.py` has the rules). NAME and fields give what is not scaled:
text, rows (published: --data.batch_size 256 --data.seq_len 8192), mesh. Memory is reported by the
compiler for --topology (`tpu.plan`), else estimated. `run` trains the models on this machine one
after the other, and resumes when started again. `fit` fits bpb = a + b C^-c to the finished models
and writes a table, DIR/fit.json and DIR/scaling.png.

Exit codes: 0 done, 2 bad input, 75 asked to stop and saved.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from experiments.scaling.fit import draw, fit
from experiments.scaling.ladder import (
    BYTES_PER_TOKEN,
    FAMILIES,
    GPT2_VOCABULARY,
    estimated_bytes,
    make_points,
    point_config,
)
from hnet.command_line import FAILED, OneLineParser, file_path, number, run
from hnet.data import open_corpus
from hnet.data.identity import Inputs, check_inputs, inputs, read_inputs
from hnet.data.tokenizers.bpe import train_bpe
from hnet.data.tokens import read_vocabulary
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text, parse_json, read_bytes, read_json
from hnet.outputs import new_files, write_new
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from hnet.train.command import train_to_end
from hnet.train.config import Config, config_from_json
from hnet.train.metrics_file import read_metrics
from hnet.train.named import run_config
from hnet.train.workdir import claim_workdir

PLANNED = {"name", "runs", "steps", "family", "train_flops"}
BPE_SAMPLE = 8 << 20  # bytes of training text from which the vocabulary is learned
console = Console(highlight=False, soft_wrap=True, markup=False)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m experiments.scaling", description=__doc__)
    parser.add_argument("command", choices=("plan", "run", "fit"))
    parser.add_argument("--out", type=file_path, required=True, metavar="DIR")
    parser.add_argument(
        "--levels", type=number(int, 1, 1 << 20), nargs="+", default=[256, 512, 768, 1024, 1536]
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--bytes-per-parameter", type=number(float, 1e-9, 1e9), default=20 * BYTES_PER_TOKEN,
        metavar="N",
        help="training bytes per parameter (default: 20 tokens, Hoffmann et al. 2022)",
    )  # fmt: skip
    parser.add_argument("--bpe", type=number(int, 257, 1 << 20), metavar="SIZE",
                        help="learn a vocabulary of that size")  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=file_path, metavar="FILE", help="tokenizer.json of a byte-level BPE"
    )
    parser.add_argument("--topology", metavar="KIND:SHAPE", help="TPU slice to compile for")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run: these models")
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if options.command == "plan":
        return plan(options, run_config(rest))
    if rest:
        raise ConfigError(f"{' '.join(rest)}: settings belong to `plan`, which wrote them down")
    return run_points(options) if options.command == "run" else fit_points(Path(options.out))


def plan(options: argparse.Namespace, base: Config) -> int:
    out, tokenizer = Path(options.out), ""
    written = ["plan.json", "configs", "tokenizer.json", "fit.json", "scaling.png"]
    new_files(options.out, written, "out")
    sizes = {"bytes_per_token": BYTES_PER_TOKEN, "vocab_size": GPT2_VOCABULARY}
    if "bpe" in options.families and (options.bpe or options.tokenizer):
        tokenizer, sizes = _tokenizer(options, base)
    points = make_points(
        base, tuple(options.levels), tuple(options.families),
        bytes_per_parameter=options.bytes_per_parameter, **sizes,
    )  # fmt: skip
    table = [["model", "layers", "parameters", "MFLOPs/byte", "off", "bytes", "steps", "batch",
              "peak lr", "training FLOPs", "memory/device"]]  # fmt: skip
    rows = []
    for point, model in points:
        config = replace(
            point_config(base, point, model, tokenizer), workdir=str(out / "runs" / point.name)
        )
        memory, kind = _memory(config, options.topology)
        runs = point.family != "bpe" or bool(tokenizer)
        if runs:
            file = out / "configs" / f"{point.name}.json"
            write_new(file, json_text(to_json(config), indent=1) + "\n", "out")
        rows.append({**asdict(point), "memory": memory, "memory_from": kind, "runs": runs, **sizes})
        table.append([
            point.name, str(point.layers), f"{point.parameters / 1e6:.2f}M",
            f"{point.flops_per_byte / 1e6:.2f}", f"{point.mismatch:+.1%}",
            f"{point.train_bytes / 1e6:,.1f}M", f"{point.steps:,}",
            f"{point.batch_size} x {point.seq_len}", f"{point.learning_rate:.2e}",
            f"{point.train_flops:.2e}", f"{memory / 2**30:.2f} GiB {kind}",
        ])  # fmt: skip
    write_new(out / "plan.json", json_text(rows, indent=1) + "\n", "out")
    _print_table(table)
    if off := [point.name for point, _ in points if abs(point.mismatch) > 0.05]:
        console.print(f"off by more than 5%: {', '.join(off)}: leave levels this small out")
    if not all(row["runs"] for row in rows):
        console.print("bpe is planned with GPT-2's sizes: --bpe or --tokenizer is needed to train")
    console.print(f"configurations: {out / 'configs'}")
    console.print(f"python -m experiments.scaling run --out {out}")
    return 0


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _tokenizer(options: argparse.Namespace, base: Config) -> tuple[str, dict[str, Any]]:
    """(vocabulary file, {its size and its bytes per token on the training text}). With --bpe the
    vocabulary is learned from the training text."""
    corpus, out = open_corpus(replace(base.data, tokenizer="")), Path(options.out)
    sample = corpus.train.beginning(BPE_SAMPLE)
    file = options.tokenizer
    if not file:
        out.mkdir(parents=True, exist_ok=True)
        file = str(out / "tokenizer.json")
        train_bpe(sample, options.bpe).save(file)
    vocabulary = read_vocabulary(file)
    tokens = sum(len(vocabulary.encode(text)) for text in sample)
    return file, {
        "bytes_per_token": sum(map(len, sample)) / tokens, "vocab_size": vocabulary.size
    }  # fmt: skip


def _memory(config: Config, topology: str | None) -> tuple[float, str]:
    if not topology:
        return estimated_bytes(config), "(estimate)"
    from tpu.aot import capacities, compile_plan, open_slice

    compiled = compile_plan(config, open_slice(topology), capacities(config))
    return compiled.hbm_bytes, f"on {topology}" + ("" if compiled.fits else ": does not fit")


def _planned(out: Path) -> list[dict[str, Any]]:
    """The rows of a plan. Raises ConfigError for a file that `plan` did not write."""
    try:
        rows = parse_json(read_bytes(out / "plan.json"))
        if all(PLANNED <= row.keys() for row in rows):
            return rows
    except OSError as e:
        raise ConfigError(f"{out / 'plan.json'}: {e.strerror}; make it with `plan`") from None
    except (ValueError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{out / 'plan.json'} is no plan: make it with `plan`")


def _check_same_text(out: Path, names: Iterable[str], now: Inputs | None = None) -> None:
    """Raise ConfigError unless the models trained so far, and `now`, read one text."""
    texts = {name: read_inputs(out / "runs" / name) for name in names} | {"this start": now}
    known = {name: {"data.files": read["data.files"]} for name, read in texts.items() if read}
    first = next(iter(known), "")
    for read in known.values():
        check_inputs(known[first], read, f"model {first}", "train all models on one text")


def run_points(options: argparse.Namespace) -> int:
    out = Path(options.out)
    rows = {row["name"]: row for row in _planned(out) if row["runs"]}
    if unknown := set(options.only or ()) - rows.keys():
        raise ConfigError(f"only={sorted(unknown)}: the plan has {', '.join(rows)}")
    enable_compilation_cache()
    failed = []
    for name in options.only or rows:
        file = out / "configs" / f"{name}.json"
        config = config_from_json(read_json(file))
        if _result(out, rows[name]) is not None:
            for line in claim_workdir(config, done=rows[name]["steps"], ended=True):
                console.print(escape(printable(line)))
            continue
        console.print(f"training {name}: {rows[name]['steps']} steps")
        _check_same_text(out, rows, inputs(config.data, open_corpus(config.data)))
        outcome = train_to_end(config)
        if outcome == REQUEUE_EXIT_CODE:
            return outcome
        if outcome == FAILED:
            failed.append(name)  # the others are still trained
    if failed:
        console.print(f"failed: {', '.join(failed)}; the same command tries them again")
    return FAILED if failed else 0


def _result(out: Path, row: dict[str, Any]) -> float | None:
    """Held-out bits per byte of a finished run; None if it is not finished."""
    ends = [r for r in read_metrics(out / "runs" / row["name"]) if r["step"] == row["steps"]]
    return ends[-1].get("eval/bpb") if ends else None


def fit_points(out: Path) -> int:
    points: dict[str, list[dict]] = {}
    rows = [row for row in _planned(out) if row["runs"]]
    _check_same_text(out, [row["name"] for row in rows if _result(out, row) is not None])
    for row in rows:
        if (bpb := _result(out, row)) is not None:
            points.setdefault(row["family"], []).append({**row, "bpb": bpb})
    if not points:
        raise ConfigError(f"no model of {out / 'plan.json'} is trained: `run` does that")
    table, curves = [["family", "sizes", "a", "b", "c", "C0"]], {}
    for family, rows in points.items():
        shown = ["-"] * 3
        if len(rows) >= 3:
            curve = fit([r["train_flops"] for r in rows], [r["bpb"] for r in rows])
            curves[family] = curve
            shown = [
                f"{getattr(curve, n):.3f}"
                + (" [{:.3f}, {:.3f}]".format(*curve.intervals[n]) if curve.intervals else "")
                for n in "abc"
            ]
        unit = f"{curves[family].unit:.2e}" if family in curves else "-"
        table.append([family, str(len(rows)), *shown, unit])
    for row in (row for rows in points.values() for row in rows):
        console.print(f"{row['name']:<12} {row['train_flops']:.2e} FLOPs  {row['bpb']:.4f} bpb")
    _print_table(table)
    console.print("bpb = a + b (C / C0)^-c, 95% by bootstrap; three sizes for a curve, five for it")
    content = {"points": points, "curves": {f: asdict(c) for f, c in curves.items()}}
    (out / "fit.json").write_text(json_text(content, indent=1) + "\n")
    if not draw(points, curves, out / "scaling.png"):
        console.print("scaling.png is left out: it needs the extra sweep")
    return 0


if __name__ == "__main__":
    run(main, trains=True)
