"""How a model's boundaries agree with annotated words, morphemes or code tokens.

    python -m experiments.boundaries --checkpoint RUN --gold ud/tr.jsonl morph/eng.sentences.tsv

For every file and stage: precision, recall and F1 against each kind of gold boundary, and the same
for equally many random and equally many evenly spaced boundaries; boundary enrichment Bq (arXiv
2601.22805); chunk lengths; boundaries inside UTF-8 characters; classes of the chunks as in Qtok;
with --lexicon the shares of chunks that are words (%TR) and roots or morphemes (%Pure).

--gold takes .jsonl with "spans" of bytes (Universal Dependencies), *.words.tsv and *.sentences.tsv
(SIGMORPHON), .py and .jsonl with "path" (code), and .jsonl from `experiments.segment --json`.
Characters and whitespace are gold kinds of every text.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hnet import load
from hnet.bounds import Count, FilePath, Natural
from hnet.command_line import parse, run
from hnet.decode.score import logprobs
from hnet.decode.segment import segment_all, segmenter
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.inspect import metrics
from hnet.inspect.gold import annotate, clip, read_annotated, thin
from hnet.inspect.lexical import lexicon_shares, read_lexicon, turkish_lower, vocabulary_report
from hnet.inspect.segmentation import Alignment, Segmentation
from hnet.model import HNetLM, split
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache


@dataclass(frozen=True)
class BoundariesConfig:
    """Which model's boundaries to compare with which annotations."""

    checkpoint: FilePath
    """WORKDIR or WORKDIR@STEP of a run, an official checkpoint with its JSON, or hf://OWNER/NAME"""
    gold: tuple[FilePath, ...]
    """annotated files"""
    lexicon: FilePath | None = None
    """file with one word per line, then a tab and its roots and morphemes, separated by spaces"""
    case: Literal["plain", "turkish"] = "plain"
    """lower-casing of chunks and lexicon; turkish distinguishes dotted from dotless i"""
    max_texts: Natural = 1000
    """maximum number of texts per file, spread evenly over it; 0 = all"""
    max_bytes: Count = 2048
    """length at which longer texts are truncated"""
    bos: bool | None = None
    """whether to put BOS (byte 254) before each text; None = as in training"""
    seed: Natural = 0
    """seed of the random shifts that boundary enrichment is compared with"""
    json: bool = False
    """print one JSON object instead of tables"""


def main() -> None:
    config = parse(BoundariesConfig)
    texts = {path: _texts(path, config) for path in config.gold}
    lexicon = read_lexicon(config.lexicon) if config.lexicon is not None else None
    enable_compilation_cache()
    model = load(config.checkpoint, bos=config.bos)
    if not model.config.num_chunked:
        raise ConfigError(f"checkpoint={config.checkpoint} cuts nowhere: it has one stage")
    reports = {}
    for path, own in texts.items():
        found, surprisal = _cut(model, own)
        reports[path] = {
            "texts": len(own),
            "bytes": sum(len(seg.data) for seg in own),
            "stages": [
                stage_report(found, surprisal, s, stage.chunking.alignment, config, lexicon)
                for s, stage in enumerate(model.config.stages[:-1])
            ],
        }
    if config.json:
        print(json_text({"checkpoint": config.checkpoint, "files": reports}))
    else:
        for path, report in reports.items():
            _print(path, report)


def _texts(path: str, config: BoundariesConfig) -> list[Segmentation]:
    """Texts of a file, up to `max_texts`, with gold boundaries and no stages."""
    texts = thin([seg for seg in read_annotated(path) if seg.data], config.max_texts)
    if not texts:
        raise ConfigError(f"gold={path!r} has no text that can be used: give another file")
    texts = [clip(replace(seg, stages=()), config.max_bytes) for seg in texts]
    return [annotate(seg, "characters", "whitespace") for seg in texts]


def _cut(
    model: HNetLM, texts: Sequence[Segmentation]
) -> tuple[list[Segmentation], list[np.ndarray]]:
    """The texts with the model's chunks, and the -log2 probability of each byte."""
    graph, params = split(model)
    data = [seg.data for seg in texts]
    cut = segment_all(segmenter(graph, model.config, bos=model.bos), params, data)
    found = [replace(seg, name=text.name, gold=text.gold) for seg, text in zip(cut, texts)]
    return found, [-s.logprobs / math.log(2) for s in logprobs(model, data)]


def stage_report(
    found: Sequence[Segmentation],
    surprisal: Sequence[np.ndarray],
    stage: int,
    alignment: Alignment,
    config: BoundariesConfig,
    lexicon: tuple[set[str], set[str]] | None,
) -> dict[str, Any]:
    """All figures about the boundaries of one stage, as plain JSON content."""
    kinds = sorted({kind for seg in found for kind, offsets in seg.gold.items() if offsets})
    scores = {kind: metrics.boundary_scores(found, kind, stage=stage) for kind in kinds}
    rows = [(_as_routed(seg, stage, alignment), s) for seg, s in zip(found, surprisal)]
    chunks = [chunk for seg in found for chunk in seg.chunks(stage)]
    vocabulary = vocabulary_report(chunks)
    report = {
        "gold": {
            kind: {
                name: {"precision": s.precision, "recall": s.recall, "f1": s.f1}
                for name, s in vars(score).items()
            }
            for kind, score in scores.items()
        },
        "enrichment": _finite(asdict(metrics.boundary_enrichment(rows, seed=config.seed))),
        "chunk_bytes": metrics.chunk_length_stats(
            np.concatenate([seg.chunk_lengths(stage) for seg in found])
        ),
        "utf8_split_frac": metrics.utf8_split_frac(found, stage),
        "undecided_frac": metrics.undecided_frac(found, stage),
        "chunks": asdict(vocabulary.total),
        "classes": {
            name: asdict(tally.share_of(vocabulary.total))
            for name, tally in vocabulary.classes.items()
        },
    }
    if lexicon:
        lower = turkish_lower if config.case == "turkish" else str.lower
        report["lexicon"] = asdict(lexicon_shares(chunks, *lexicon, lower=lower))
    return report


def _as_routed(seg: Segmentation, stage: int, alignment: Alignment) -> np.ndarray:
    """Boundaries of a stage at the bytes that decided them, bool (bytes,); the first is forced."""
    mask = np.zeros(len(seg.data), bool)
    mask[seg.boundaries(stage) - (alignment == "end")] = True
    return mask


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _print(path: str, report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    texts = f"{report['texts']} text{'s' * (report['texts'] != 1)}"
    title = f"{path}: {texts}, {report['bytes']:,} bytes"
    console.print(Text(printable(title), "bold"), soft_wrap=True)
    gold = Table("stage", "gold", "precision", "recall", "F1", "random", "fixed stride", box=None)
    lengths = Table("stage", "bytes per chunk", "5 / 50 / 95 / longest", "inside characters",
                    "p 0.4-0.6", "Bq", "Z", box=None)  # fmt: skip
    classes = Table("stage", "share of chunks (types / occurrences, %)", box=None)
    for s, stage in enumerate(report["stages"]):
        for kind, found in stage["gold"].items():
            learned = found["learned"]
            row = [learned["precision"], learned["recall"], learned["f1"]]
            row += [found["random"]["f1"], found["fixed_stride"]["f1"]]
            gold.add_row(str(s), printable(kind), *(f"{value:.3f}" for value in row))
        stats, enrichment = stage["chunk_bytes"], stage["enrichment"]
        tail = " / ".join(f"{stats[name]:.0f}" for name in ("p5", "p50", "p95", "longest"))
        bq, z = ("-" if enrichment[n] is None else f"{enrichment[n]:.2f}" for n in ("bq", "z"))
        split_frac, undecided = stage["utf8_split_frac"], stage["undecided_frac"]
        lengths.add_row(
            str(s), f"{stats['mean']:.2f}", tail, f"{split_frac:.1%}", f"{undecided:.1%}", bq, z
        )
        named = {name: share for name, share in stage["classes"].items() if share["types"]}
        words = {"%TR": "words", "%Pure": "pure"} if "lexicon" in stage else {}
        named |= {name: stage["lexicon"][field] for name, field in words.items()}
        shares = (f"{name} {_percent(share)}" for name, share in named.items())
        classes.add_row(str(s), "  ".join(shares))
    for table in (gold, lengths, classes):
        console.print(table, "")


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['types']:.1f}/{100 * share['occurrences']:.1f}"


if __name__ == "__main__":
    run(main)
