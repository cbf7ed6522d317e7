"""How equally models and tokenizers split languages into chunks, on parallel text.

    python -m experiments.fairness --checkpoint runs/routed runs/single --bpe 4096 \\
        --bpe-files eng=train.eng.txt rus=train.rus.txt --files eng=test.eng.txt rus=test.rus.txt \\
        --out reports/fairness

Files are aligned line by line. For every stage of every system: chunks per sentence in each
language and their spread (max/min, coefficient of variation, Gini), bits per byte, nats per
sentence, boundaries inside UTF-8 characters, agreement with gold words. Checkpoints are compared
with single bytes, a BPE trained on --bpe-files, and any tokenizer.json. --out gets report.json,
report.md and chunks.svg.
"""

import io
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from hnet import load
from hnet.bounds import Bounds, FilePath, Natural
from hnet.command_line import parse, run
from hnet.data.parallel import Lines, read_parallel
from hnet.data.tokenizers.bpe import read_tokenizer, token_starts, train_bpe
from hnet.decode.score import logprobs
from hnet.decode.segment import ROWS, segment_all, segmenter
from hnet.errors import ConfigError, shown
from hnet.files import json_text
from hnet.inspect.fairness import LanguageScore, cut_at, score_language
from hnet.inspect.fairness_report import (
    Scores,
    language_rows,
    plot,
    summary_rows,
    to_json,
    to_markdown,
)
from hnet.inspect.gold import read_ud, thin
from hnet.inspect.segmentation import Segmentation
from hnet.model import split
from hnet.outputs import new_files, write_new
from hnet.printable import printable

REPORT = ["report.md", "chunks.svg", "report.json"]  # if the last exists, all are complete

Cut = Callable[[Sequence[bytes]], tuple[list[Segmentation], float, int]]
"""texts -> (their segmentations, nats, scored bytes)"""


@dataclass(frozen=True)
class FairnessConfig:
    """Which systems to compare, on which text."""

    files: tuple[str, ...]
    """LANGUAGE=FILE, one sentence per line, or .jsonl with "text"; line i says the same in all"""
    out: FilePath
    """folder for the report; it must not contain one yet"""
    checkpoint: tuple[FilePath, ...] = ()
    """work directories of runs, or official checkpoints"""
    tokenizer: tuple[FilePath, ...] = ()
    """tokenizer.json files"""
    bpe: Annotated[int, Bounds(0, 1 << 20)] = 0
    """vocabulary size of a byte-level BPE to train; 0 = none"""
    bpe_files: tuple[str, ...] = ()
    """LANGUAGE=FILE to train the BPE on"""
    unseen: tuple[str, ...] = ()
    """LANGUAGE=FILE aligned with the files, for languages left out of every spread and mean"""
    gold: tuple[str, ...] = ()
    """LANGUAGE=FILE with gold words: .jsonl with "text" and "spans" of bytes"""
    max_lines: Natural = 1000
    """maximum number of sentences, spread evenly over the files; 0 = all"""


@dataclass(frozen=True)
class System:
    """One way to split text into chunks."""

    name: str
    cut: Cut


def main() -> None:
    config = parse(FairnessConfig)
    out = Path(config.out)
    new_files(config.out, REPORT, "out")
    if bool(config.bpe) != bool(config.bpe_files):
        raise ConfigError("bpe and bpe_files belong together: give both, or neither")
    unseen = {entry.partition("=")[0] for entry in config.unseen}
    if known := unseen & {entry.partition("=")[0] for entry in config.files}:
        raise ConfigError(f"unseen={sorted(known)[0]!r} is in files too: name it once")
    lines = read_parallel([*config.files, *config.unseen], field="files, unseen")
    lines = {language: thin(texts, config.max_lines) for language, texts in lines.items()}
    gold: dict[str, list[Segmentation]] = {}
    for language, path in _pairs(config.gold):
        gold.setdefault(language, []).extend(read_ud(path))
    if empty := [language for language, found in gold.items() if not found]:
        raise ConfigError(f"gold: the file of {shown(empty[0])} holds no sentence: give another")
    systems = [byte_system()]
    if config.bpe:
        texts = [t for own in read_parallel(config.bpe_files).values() for t in own]
        tokenizer = train_bpe(texts, config.bpe)  # may get fewer tokens from a short text
        systems.append(token_system(f"BPE {tokenizer.get_vocab_size()}", tokenizer))
    systems += [token_system(Path(path).stem, read_tokenizer(path)) for path in config.tokenizer]
    systems += [model_system(path) for path in config.checkpoint]
    write_report(out, measure(systems, lines, gold), unseen)


def _pairs(entries: Sequence[str]) -> list[tuple[str, str]]:
    for entry in entries:
        if not all(entry.partition("=")):
            raise ConfigError(f"gold={entry!r}: write LANGUAGE=FILE")
    return [(a, b) for a, _, b in (entry.partition("=") for entry in entries)]


def byte_system() -> System:
    """Every byte is a chunk, as in a byte-level model without chunking."""
    return System("bytes", lambda texts: ([cut_at(t, range(len(t))) for t in texts], np.nan, 0))


def token_system(name: str, tokenizer: Any) -> System:
    def cut(texts):
        return [cut_at(t, token_starts(tokenizer, t)) for t in texts], np.nan, 0

    return System(name, cut)


def model_system(path: str) -> System:
    """A trained model; each sentence is a text of its own, as in `hnet.decode`."""
    model = load(path)
    graph, params = split(model)
    segment = segmenter(graph, model.config, bos=model.bos)

    known: dict[bytes, tuple[Segmentation, float, int]] = {}  # a text may occur in several reports

    def cut(texts):
        new = list({text: None for text in texts if text not in known})
        cuts = segment_all(segment, params, new)
        if model.bos:  # every byte has its bits
            scores = [np.log(2) * np.asarray(found.bits) for found in cuts]
        else:
            scores = [-score.logprobs for score in logprobs(model, new, batch_size=ROWS)]
        for text, found, nats_L in zip(new, cuts, scores):
            scored = int(np.isfinite(nats_L).sum())
            known[text] = found, float(np.nansum(nats_L, dtype=np.float64)), scored
        found, nats, scored = zip(*(known[text] for text in texts))
        return list(found), math.fsum(nats), sum(scored)

    return System(Path(path).name, cut)


def measure(systems: Sequence[System], lines: Lines, gold: dict[str, list[Segmentation]]) -> Scores:
    """Split every language with every system."""
    if len({system.name for system in systems}) < len(systems):
        names = ", ".join(system.name for system in systems)
        raise ConfigError(f"two systems have one name ({names}): rename a folder or file")
    console = Console(stderr=True)
    jobs = [(system, language) for system in systems for language in lines]
    scores: dict[str, dict[str, LanguageScore]] = {system.name: {} for system in systems}
    for system, language in track(
        jobs, "cutting", console=console, disable=not console.is_terminal
    ):
        if language == next(iter(lines)):
            # Each shape of texts is a program with memory mappings of its own, and Linux gives a
            # process 65,530: those of the system before are not needed.
            jax.clear_caches()
        found, nats, scored_bytes = system.cut(lines[language])
        marked = gold.get(language, [])
        cut = system.cut([seg.data for seg in marked])[0] if marked else []
        scores[system.name][language] = score_language(
            found, nats=nats, scored_bytes=scored_bytes,
            gold=[replace(seg, gold=mark.gold) for seg, mark in zip(cut, marked)],
        )  # fmt: skip
    return scores


def write_report(out: Path, scores: Scores, unseen: Collection[str]) -> None:
    """Write report.json, report.md and chunks.svg to a folder and print the tables."""
    chart = io.BytesIO()
    plot(chart, scores, unseen)
    content = json_text(to_json(scores, unseen), indent=1) + "\n"
    for name, text in zip(REPORT, (to_markdown(scores, unseen), chart.getvalue(), content)):
        write_new(out / name, text, "out")
    console = Console(highlight=False)
    for head, *rows in (summary_rows(scores, unseen), language_rows(scores, unseen)):
        table = Table(*map(escape, map(printable, head)), box=None)
        for row in rows:
            table.add_row(*map(Text, map(printable, row)))
        console.print(table, "")
    print(f"wrote {out}/report.json, report.md, chunks.svg")


if __name__ == "__main__":
    run(main)
