"""Routing per script against a single router and BPE, end to end: from aligned text to one table.

    python -m experiments.scripts --train eng=a/eng.txt rus=a/rus.txt eng=b/eng.txt ...

Holds out lines of each text. On the other lines it calibrates a target per script and trains a BPE
and, on the same batches, the systems of --systems: mixed_scripts_routed, its baseline
mixed_scripts_single, one router with a parity loss, FlexiTokens and MAGNET. Then it reports how
equally each of them splits the held-out lines, over all texts together and per text
(`experiments.fairness`). The first two take about 25 minutes on two CPU cores. The same command
again resumes.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments.calibrate import Calibration, calibrate, with_routes
from experiments.configs import mixed_scripts_routed, mixed_scripts_single
from experiments.configs.systems import with_chunking
from experiments.fairness import (
    byte_system,
    measure,
    model_system,
    token_system,
    write_report,
)
from hnet.bounds import Bounds, ChunkBytes, Count, FilePath, Natural, Vocabulary
from hnet.chunking.losses.binomial import Binomial
from hnet.chunking.losses.hinge import Hinge
from hnet.chunking.losses.parity import Parity
from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.predictors.mlp import MLP
from hnet.chunking.table import LOSSES
from hnet.command_line import parse, run
from hnet.data.parallel import Lines, read_parallel
from hnet.data.pipeline import Batch, eval_batches, train_batches
from hnet.data.row_routes import in_unknown_scripts
from hnet.data.tokenizers.bpe import train_bpe
from hnet.dotted import differences
from hnet.errors import ConfigError, told
from hnet.fields import to_json
from hnet.files import json_text, read_json
from hnet.inspect.gold import thin
from hnet.outputs import local_folder, write_new
from hnet.parts import settings_of
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.train.command import train_to_end
from hnet.train.compiled_run import run_batches
from hnet.train.config import Config, RateControlConfig
from hnet.train.session import Outcome

LINES_A_DOCUMENT = 8
LAST = 100  # number of last updates whose batches the rates are measured on


@dataclass(frozen=True)
class FairnessTableConfig:
    """Which text to use, and how much of it."""

    train: tuple[str, ...]
    """LANGUAGE=FILE, aligned line by line; naming the languages again adds a second aligned text"""
    unseen: tuple[str, ...] = ()
    """LANGUAGE=FILE aligned with the last text, of languages that are measured, not trained on"""
    groups: tuple[str, ...] = ()
    """scripts that share a route, such as Hiragana+Katakana; see `experiments.calibrate`"""
    out: FilePath = "runs/fairness"
    """folder for the text, both runs and the reports"""
    systems: tuple[str, ...] = ("routed", "single")
    """systems to train: routed, single, parity, flexitokens, magnet"""
    mean_ratio: ChunkBytes = 6.0
    """bytes per chunk over all languages, for all models"""
    steps: Natural = 0
    """number of updates per model; 0 = as configured"""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """seed of all runs"""
    bpe: Vocabulary = 4096
    """vocabulary size of the BPE"""
    max_lines: Count = 2000
    """number of lines used per text, spread evenly over it"""
    heldout: Count = 100
    """number of these lines held out per text"""


def main() -> int:
    config = parse(FairnessTableConfig)
    if unknown := [name for name in config.systems if name not in SYSTEMS]:
        raise ConfigError(f"systems={unknown[0]!r} is unknown: use some of {', '.join(SYSTEMS)}")
    out = local_folder(config.out, "out")
    train_lines, heldout = split_texts(config)
    runs = run_configs(config, train_lines, out)
    check_settings(out, config)
    write_text(out, {"train": train_lines, "heldout": heldout["heldout"]})
    tokenizer = train_bpe([t for own in train_lines.values() for t in own], config.bpe)
    enable_compilation_cache()
    for settings in runs:
        began, cpu_began = time.monotonic(), time.process_time()
        outcome = train_to_end(settings)
        if isinstance(outcome, int):
            return outcome
        wall, cpu = time.monotonic() - began, time.process_time() - cpu_began
        print(f"{settings.workdir} took {wall:.0f} s, {cpu:.0f} s of all cores")
        if settings.model.num_routes > 1:
            print_rates(settings, outcome)
    systems = [byte_system(), token_system(f"BPE {tokenizer.get_vocab_size()}", tokenizer)]
    systems += [model_system(settings.workdir) for settings in runs]
    for name, lines in heldout.items():
        if not (out / name / "report.json").exists():
            print(f"\n{name}:")
            write_report(out / name, measure(systems, lines, {}), set(lines) - set(train_lines))
    return 0


def check_settings(out: Path, config: FairnessTableConfig) -> None:
    """Store the settings of the study in its folder; raise ConfigError if it has other ones."""
    mine, path = to_json(config) | {"out": ""}, out / "settings.json"
    if not path.exists():
        write_new(path, json_text(mine, indent=1) + "\n", "out")
    for field, new, old in differences(mine, read_json(path, "settings")):
        raise ConfigError(
            f"{field}={told(new)}, but the study in out={str(out)!r} has {told(old)}: use that, "
            "or another folder"
        )


def print_rates(settings: Config, outcome: Outcome) -> None:
    """Print bytes per chunk of each route with the final parameters, and how far off its target.

    Measured on the batches of the last updates and on the held-out text, which was used to set
    nothing; for a fitted default route, on the held-out text in synthetic scripts.
    """
    data, groups, names = settings.data, settings.model.route_groups, settings.model.route_names
    start = max(0, settings.train.steps - LAST)

    def sizes(batches: Iterable[Batch]) -> dict[str, float]:
        capacities = (None,) * settings.model.num_chunked
        found = run_batches(
            outcome.program, outcome.state.params, batches, capacities, route_names=names
        )
        return found.positions_per_chunk(0)

    with train_batches(
        outcome.corpus, data, seed=settings.seed, start=start, route_groups=groups
    ) as batches:
        last = sizes(
            batch | {"document_ids": np.zeros_like(batch["segment_ids"])}
            for batch in islice(batches, settings.train.steps - start)
        )
    heldout = outcome.evaluation.positions_per_chunk(0)
    if settings.rate_control.fit_default:
        batches = eval_batches(outcome.corpus.heldout, data, route_groups=groups)
        heldout |= sizes(in_unknown_scripts(batches, settings.seed))
        last.pop(names[0], None)
    for name, N in zip(names, settings.model.stages[0].chunking.target_ratios):
        shown = [
            f"{found[name]:.3f} {where} ({found[name] / N - 1:+.1%})"
            for where, found in (
                (f"in the last {settings.train.steps - start} batches", last),
                ("held out", heldout),
            )
            if name in found
        ]
        print(f"  {name}: target {N} bytes per chunk; {', '.join(shown) or 'no text'}")


def split_texts(config: FairnessTableConfig) -> tuple[Lines, dict[str, Lines]]:
    """(lines to train on, lines to measure on: of all texts together, and per text if several).

    Raises ConfigError if a text has other languages than the first or too few lines to hold out.
    """
    texts: list[dict[str, str]] = []
    for entry in config.train:
        language = entry.partition("=")[0]
        text = next((text for text in texts if language not in text), None)
        if text is None:
            texts.append(text := {})
        text[language] = entry
    if odd := [text for text in texts if set(text) != set(texts[0])]:
        raise ConfigError(f"train: {[*odd[0]]} but first {[*texts[0]]}: give the same languages")
    if known := {entry.partition("=")[0] for entry in config.unseen} & set(texts[0]):
        raise ConfigError(f"unseen={sorted(known)[0]!r} is in train too: name it once")
    parts = []
    for text in texts:
        more = config.unseen if text is texts[-1] else ()
        lines = read_parallel([*text.values(), *more], field="train, unseen")
        parts.append(hold_out({k: thin(own, config.max_lines) for k, own in lines.items()}, config))
    join = lambda lines: {k: [t for own in lines for t in own[k]] for k in texts[0]}
    measured = {"heldout": join([heldout for _, heldout in parts])}
    if len(parts) > 1:
        measured |= {f"heldout-{i}": heldout for i, (_, heldout) in enumerate(parts, 1)}
    elif config.unseen:
        measured = {"heldout": parts[0][1]}
    return join([train for train, _ in parts]), measured


def hold_out(lines: Lines, config: FairnessTableConfig) -> tuple[Lines, Lines]:
    """(training lines, held-out lines). Raises ConfigError if no line is left to train on."""
    count = len(next(iter(lines.values())))
    if not 0 < config.heldout < count:
        raise ConfigError(f"heldout={config.heldout} of {count} lines: use 1 to {count - 1}")
    held = {i * count // config.heldout for i in range(config.heldout)}
    pick = lambda wanted: {
        k: [t for i, t in enumerate(own) if (i in held) == wanted] for k, own in lines.items()
    }
    return pick(False), pick(True)


def _file(out: Path, part: str, language: str) -> Path:
    return out / "text" / f"{part}.{language}.jsonl"


def write_text(out: Path, parts: dict[str, Lines]) -> None:
    """Write one file per part and language; its documents have several lines each.

    Raises ConfigError if such a file exists with other text.
    """
    for part, lines in parts.items():
        for language, texts in lines.items():
            groups = [
                texts[i : i + LINES_A_DOCUMENT] for i in range(0, len(texts), LINES_A_DOCUMENT)
            ]
            documents = [{"text": b"\n".join(group).decode(errors="replace")} for group in groups]
            path = _file(out, part, language)
            data = "".join(json.dumps(document) + "\n" for document in documents).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
            elif path.read_bytes() != data:
                raise ConfigError(f"out={str(out)!r} holds other text: choose another folder")


def routed(config: FairnessTableConfig, found: Calibration) -> Config:
    """One router and one target per script."""
    return with_routes(mixed_scripts_routed.config(), found)


def single(config: FairnessTableConfig, found: Calibration) -> Config:
    """One router and one target for all scripts."""
    return _with_chunking(mixed_scripts_single.config(), target_ratio=config.mean_ratio)


def parity(config: FairnessTableConfig, found: Calibration) -> Config:
    """One router that is drawn to equal chunks on aligned sentences: ratio loss and parity loss."""
    losses = (Ratio.Config(), Parity.Config(weight=0.3))
    return _one_network(found, routed_parameters=False, losses=losses)


def flexitokens(config: FairnessTableConfig, found: Calibration) -> Config:
    """FlexiTokens: one predictor, a hinge with a band of rates for each script."""
    losses = (Hinge.Config(),)
    return _one_network(found, **DTP, routed_parameters=False, losses=losses)


def magnet(config: FairnessTableConfig, found: Calibration) -> Config:
    """MAGNET: one predictor and one binomial prior per script."""
    return _one_network(found, **DTP, losses=(Binomial.Config(average="routes"),))


SYSTEMS = {each.__name__: each for each in (routed, single, parity, flexitokens, magnet)}
# Boundaries are drawn in evaluation too, as in the code of both: in short runs p stays below 0.5.
DTP = {
    "predictor": MLP.Config(reference_noise_at_evaluation=True), "alignment": "end",
    "pool": "mean", "dechunk": "repeat", "residual": "add",
}  # fmt: skip


def _one_network(found: Calibration, **chunking) -> Config:
    """The baseline's run with routes and their calibrated targets, which only losses act on."""
    base = with_routes(mixed_scripts_single.config(), found)
    base = replace(base, rate_control=RateControlConfig())
    if any(settings_of(loss, LOSSES).part.is_by_row for loss in chunking["losses"]):
        base = replace(base, train=replace(base.train, rows_sharing_slots=1))
    return _with_chunking(base, hold_rate=False, **chunking)


def _with_chunking(base: Config, **fields) -> Config:
    return replace(base, model=with_chunking(base.model, **fields))


def run_configs(config: FairnessTableConfig, train_lines: Lines, out: Path) -> list[Config]:
    """The runs of all systems: same text, batches, steps and mean rate."""
    groups = [group.split("+") for group in config.groups]
    found = calibrate(train_lines, config.mean_ratio, groups)
    runs = {name: SYSTEMS[name](config, found) for name in config.systems}
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
            eval=replace(run.eval, every=0),
        )
        for name, run in runs.items()
    ]


if __name__ == "__main__":
    run(main, trains=True)
