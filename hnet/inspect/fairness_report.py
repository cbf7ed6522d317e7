"""Fairness of several systems as JSON, tables and a plot."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from hnet.errors import ConfigError
from hnet.inspect.fairness import LanguageScore, chunk_spread, mean_bpb

Scores = Mapping[str, Mapping[str, LanguageScore]]
"""system -> language -> results"""

_DERIVED = (
    "bytes_per_sentence", "chunks_per_sentence", "bytes_per_chunk", "bpb", "nats_per_sentence"
)  # fmt: skip


def to_json(scores: Scores, unseen: Collection[str] = ()) -> dict[str, Any]:
    """All results; null where a number does not exist. Spreads and means exclude `unseen`."""
    return {
        "unseen": sorted(unseen),
        "systems": [
            {
                "name": name,
                "mean_bpb": _number(mean_bpb(_seen(languages, unseen))),
                "chunks_per_sentence": [
                    asdict(chunk_spread(_seen(languages, unseen), s))
                    | {"mean": _mean_chunks(_seen(languages, unseen), s)}
                    for s in range(_num_stages(languages))
                ],
                "languages": {k: _language_json(score) for k, score in languages.items()},
            }
            for name, languages in scores.items()
        ],
    }


def summary_rows(scores: Scores, unseen: Collection[str] = ()) -> list[list[str]]:
    """The header and one row per stage of each system."""
    rows = [[
        "system", "stage", "bytes per chunk", "chunks per sentence", "max/min", "CV", "Gini",
        "mean bpb", "cuts in characters", "word F1 (random)",
    ]]  # fmt: skip
    for name, languages in scores.items():
        seen = _seen(languages, unseen)
        for s in range(_num_stages(languages)):
            equal = chunk_spread(seen, s)
            words = [
                (x.words_f1[s], x.words_f1_random[s]) for x in languages.values() if x.words_f1
            ]
            f1, by_chance = np.mean(words, axis=0) if words else (math.nan, math.nan)
            num_bytes, chunks = sum(x.num_bytes for x in seen), sum(x.chunks[s] for x in seen)
            rows.append([
                name, str(s), f"{num_bytes / chunks:.2f}", f"{_mean_chunks(seen, s):.1f}",
                f"{equal.max_over_min:.3f}", f"{equal.cv:.3f}", f"{equal.gini:.3f}",
                _shown(mean_bpb(seen), "{:.3f}"),
                f"{np.mean([x.utf8_split_frac[s] for x in seen]):.1%}",
                _shown(f1, "{:.2f}") + (f" ({by_chance:.2f})" if words else ""),
            ])  # fmt: skip
    return rows


def language_rows(scores: Scores, unseen: Collection[str] = ()) -> list[list[str]]:
    """The header and one row per language, with one column per system."""
    first = next(iter(scores.values()))
    rows = [["language", "bytes per sentence", *scores]]
    for language, score in first.items():
        mark = " (unseen)" if language in unseen else ""
        row = [language + mark, f"{score.bytes_per_sentence:.1f}"]
        for languages in scores.values():
            own = languages[language]
            sizes = zip(own.chunks_per_sentence, own.bytes_per_chunk)
            chunks = " / ".join(f"{n:.1f} ({size:.2f})" for n, size in sizes)
            row.append(chunks + (f"; {own.bpb:.3f} bpb" if own.scored_bytes else ""))
        rows.append(row)
    return rows


def to_markdown(scores: Scores, unseen: Collection[str] = ()) -> str:
    """Both tables as Markdown."""
    note = "Chunks per sentence (bytes per chunk) of each stage, outermost first; bits per byte:"
    tables = summary_rows(scores, unseen), language_rows(scores, unseen)
    return f"{_markdown_table(tables[0])}\n{note}\n\n{_markdown_table(tables[1])}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    head, *body = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body, ""])


def plot(file: str | os.PathLike | BinaryIO, scores: Scores, unseen: Collection[str] = ()) -> None:
    """Plot the chunks per sentence of each language over the mean of its system and stage.

    Equal heights mean equal treatment.
    Raises ConfigError without the plotting library (the extra `fairness`).
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "the plot needs a library that is not installed: pip install 'hnet-jax[fairness]'"
        ) from None
    languages = list(next(iter(scores.values())))
    bars = [(name, s) for name, found in scores.items() for s in range(_num_stages(found))]
    width = 0.8 / len(bars)
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "fairness"}):
        figure = Figure(figsize=(2 + 0.3 * len(languages) * len(bars), 4), layout="constrained")
        axes = figure.subplots()
        for i, (name, s) in enumerate(bars):
            found = scores[name]
            mean = _mean_chunks(_seen(found, unseen), s)
            heights = [found[k].chunks_per_sentence[s] / mean for k in languages]
            equal = chunk_spread(_seen(found, unseen), s)
            stage = f", stage {s}" if _num_stages(found) > 1 else ""
            label = f"{name}{stage} (max/min {equal.max_over_min:.2f})"
            axes.bar(
                np.arange(len(languages)) + (i + 0.5) * width - 0.4, heights, width, label=label
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(
            range(len(languages)), [k + ("*" if k in unseen else "") for k in languages]
        )
        axes.set_ylabel("chunks per sentence / mean" + (" (* unseen)" if unseen else ""))
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _seen(languages: Mapping[str, LanguageScore], unseen: Collection[str]) -> list[LanguageScore]:
    return [score for language, score in languages.items() if language not in unseen]


def _num_stages(languages: Mapping[str, LanguageScore]) -> int:
    return len(next(iter(languages.values())).chunks)


def _mean_chunks(languages: Sequence[LanguageScore], stage: int) -> float:
    return float(np.mean([score.chunks_per_sentence[stage] for score in languages]))


def _language_json(score: LanguageScore) -> dict[str, Any]:
    content = asdict(score) | {name: getattr(score, name) for name in _DERIVED}
    return {k: _number(v) if isinstance(v, float) else v for k, v in content.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
