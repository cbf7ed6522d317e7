"""Routing per script against one router and BPE, end to end: from aligned text to one table.

    python -m experiments.fairness_table --train eng=eng.txt rus=rus.txt --test eng=b.txt rus=c.txt

Holds lines of the training text out, calibrates a target for each script, trains
mixed_scripts_routed and its twin mixed_scripts_single on the same batches, trains a BPE on the same
lines, and reports how equally all of them cut the held-out lines and the test text
(`experiments.fairness`). Two CPU cores, about 25 minutes. The same command again goes on where it
was stopped.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.calibrate import calibrate, with_routes
from experiments.command_line import parse, run
from experiments.configs import mixed_scripts_routed, mixed_scripts_single
from experiments.fairness import (
    byte_system,
    measure,
    model_system,
    thin,
    token_system,
    write_report,
)
from hnet.config import ConfigError
from hnet.data.parallel import Lines, read_parallel
from hnet.inspect.tokens import train_bpe
from hnet.train.compile_cache import enable_compilation_cache
from hnet.train.config import Config
from hnet.train.distributed import REQUEUE_EXIT_CODE, StopRequest
from hnet.train.loop import StopRun, train


@dataclass(frozen=True)
class FairnessTableConfig:
    """The text, and how much is made of it."""

    train: tuple[str, ...]
    """LANGUAGE=FILE, aligned line by line; a language named again goes on with another file"""
    test: tuple[str, ...] = ()
    """LANGUAGE=FILE of other aligned text to measure on"""
    unseen: tuple[str, ...] = ()
    """LANGUAGE=FILE aligned with the test text, of scripts that are not trained on"""
    out: str = "runs/fairness"
    """folder for the text, both runs and the reports"""
    mean_ratio: float = 6.0
    """bytes a chunk over all languages, of both models"""
    steps: int = 0
    """updates of each model; 0 = as configured"""
    seed: int = 0
    """of both runs"""
    bpe: int = 4096
    """size of the vocabulary of the BPE"""
    heldout: int = 300
    """training lines held out, spread evenly"""
    max_lines: int = 500
    """sentences measured, spread evenly over the test text"""


def main() -> int:
    config = parse(FairnessTableConfig)
    out = Path(config.out)
    train_lines, heldout = hold_out(read_parallel(config.train, field="train"), config)
    measured = {"heldout": heldout}
    unseen = {entry.partition("=")[0] for entry in config.unseen}
    if config.test:
        lines = read_parallel([*config.test, *config.unseen], field="test, unseen")
        measured["test"] = {k: thin(own, config.max_lines) for k, own in lines.items()}
    runs = run_configs(config, train_lines, out)
    write_text(out, {"train": train_lines, "heldout": heldout})
    enable_compilation_cache()
    for settings in runs:
        began = time.monotonic()
        with StopRequest() as stop:
            try:
                outcome = train(settings, stop)
            except StopRun as e:
                print(f"error: {e}", file=sys.stderr)
                return 1
        if outcome.evaluation is None:
            print("stopped and saved: the same command goes on")
            return REQUEUE_EXIT_CODE
        print(f"{settings.workdir} took {time.monotonic() - began:.0f} s")
    tokenizer = train_bpe([t for own in train_lines.values() for t in own], config.bpe)
    systems = [byte_system(), token_system(f"BPE {config.bpe}", tokenizer)]
    systems += [model_system(settings.workdir) for settings in runs]
    for name, lines in measured.items():
        if not (out / name / "report.json").exists():
            print(f"\n{name}:")
            write_report(out / name, measure(systems, lines, {}), unseen & set(lines))
    return 0


def hold_out(lines: Lines, config: FairnessTableConfig) -> tuple[Lines, Lines]:
    """(training lines, held-out lines). Raises ConfigError if nothing is left to train on."""
    count = len(next(iter(lines.values())))
    if not 0 < config.heldout < count:
        raise ConfigError(f"heldout={config.heldout} of {count} lines: use 1 to {count - 1}")
    held = {i * count // config.heldout for i in range(config.heldout)}
    pick = lambda wanted: {
        k: [t for i, t in enumerate(own) if (i in held) == wanted] for k, own in lines.items()
    }
    return pick(False), pick(True)


def _file(out: Path, part: str, language: str) -> Path:
    return out / "text" / f"{part}.{language}.txt"


def write_text(out: Path, parts: dict[str, Lines]) -> None:
    """A file for each part and language. Raises ConfigError if there is one with other text."""
    for part, lines in parts.items():
        for language, texts in lines.items():
            path, data = _file(out, part, language), b"\n".join(texts) + b"\n"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
            elif path.read_bytes() != data:
                raise ConfigError(f"out={str(out)!r} holds other text: choose another folder")


def run_configs(config: FairnessTableConfig, train_lines: Lines, out: Path) -> list[Config]:
    """The routed run and its twin: the same text, batches, steps and mean rate."""
    routed, single = mixed_scripts_routed.config(), mixed_scripts_single.config()
    model = with_routes(routed.model, calibrate(train_lines, config.mean_ratio))
    outer, *inner = single.model.stages
    outer = replace(outer, chunking=replace(outer.chunking, target_ratio=config.mean_ratio))
    runs = {
        "routed": replace(routed, model=model),
        "single": replace(single, model=replace(single.model, stages=(outer, *inner))),
    }
    files = {
        part: tuple(str(_file(out, part, language)) for language in train_lines)
        for part in ("train", "heldout")
    }
    return [
        replace(
            run,
            workdir=str(out / name),
            seed=config.seed,
            data=replace(run.data, files=files["train"], eval_files=files["heldout"]),
            train=replace(run.train, steps=config.steps or run.train.steps),
        )
        for name, run in runs.items()
    ]


if __name__ == "__main__":
    run(main)
