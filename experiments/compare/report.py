"""Tables of a comparison: RESULTS.md, results.html, results.json, and two plots."""

import base64
import html
import io
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hnet.errors import ConfigError
from hnet.files import json_text, read_object
from hnet.printable import printable
from hnet.sweep.interval import interval

Row = dict[str, Any]
Cell = Callable[[Sequence[Row]], str]
Table = list[list[str]]
NEWLINE = "\n"
FILES = ("RESULTS.md", "results.html", "results.json", "bpb_flops.png", "bpb_chunk.png")


def check_plots() -> None:
    """Raise ConfigError unless plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the plots need the library matplotlib: pip install 'hnet-jax[sweep]'"
        ) from None


def read_row(path: str | os.PathLike) -> dict[str, Any]:
    """The row of a finished run. Raises ConfigError for a damaged file."""
    return read_object(path, "row", system=str, seed=int, bpb=(int, float))


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by system, lowest mean bits per byte first; the seeds of a system in order."""
    by_system: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_system.setdefault(row["system"], []).append(row)
    order = sorted(by_system, key=lambda name: (_mean(by_system[name], "bpb"), name))
    return {name: by_system[name] for name in order}


# --- cells ----------------------------------------------------------------------------------------


def _at(row: Row, path: str) -> Any:
    """A value of a row by a dotted path; None if it is missing. A number indexes a list."""
    value: Any = row
    for step in path.split("."):
        if isinstance(value, list):
            number = int(step)
            value = value[number] if -len(value) <= number < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _mean(rows: Sequence[Row], path: str) -> float | None:
    values = [value for row in rows if (value := _at(row, path)) is not None]
    return statistics.fmean(values) if values else None


def _number(path: str, form: str, scale: float = 1.0) -> Cell:
    def cell(rows: Sequence[Row]) -> str:
        value = _mean(rows, path)
        return "-" if value is None else format(value * scale, form)

    return cell


def _several(paths: Sequence[str], form: str) -> Cell:
    """The means of several values with slashes between; "-" if all are missing."""

    def cell(rows: Sequence[Row]) -> str:
        cells = [_number(path, form)(rows) for path in paths]
        return "-" if set(cells) == {"-"} else " / ".join(cells)

    return cell


def _bpb(rows: Sequence[Row]) -> str:
    values = [row["bpb"] for row in rows]
    spread = f" ± {interval(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _by_stage(path: str, form: str) -> Cell:
    """Means of each stage, outermost first. path: "LIST.FIELD", or "LIST" of numbers."""
    name, _, field = path.partition(".")

    def cell(rows: Sequence[Row]) -> str:
        stages = range(len(rows[0].get(name) or ()))
        cells = [_number(f"{name}.{s}.{field}".rstrip("."), form)(rows) for s in stages]
        return ", ".join(cells) or "-"

    return cell


def _f1(path: str) -> Cell:
    """F1 of the innermost stage, then of random and of evenly spaced boundaries."""
    return _several([f"{path}.-1.{name}" for name in ("f1", "random", "stride")], ".2f")


QUALITY: dict[str, Cell] = {
    "system": lambda rows: rows[0]["system"],
    "seeds": lambda rows: str(len(rows)),
    "bpb": _bpb,
    "parameters": _number("parameters", ",.0f"),
    "widths": lambda rows: ", ".join(map(str, rows[0]["widths"])),
    "training MFLOPs/byte": _number("flops_per_byte", ".3f", 1e-6),
    "training bytes": _number("train_bytes", ",.0f"),
    "training bytes/s": _number("train_bytes_per_sec", ",.0f"),
    "decoded bytes/s": _number("decode_bytes_per_sec", ",.0f"),
    "valid UTF-8": _number("valid_utf8", ".0%"),
}
CHUNKS: dict[str, Cell] = {
    "system": lambda rows: rows[0]["system"],
    "bytes/chunk": _number("chunks.-1.mean", ".2f"),
    "p10 / p50 / p90": _several([f"chunks.-1.p{q}" for q in (10, 50, 90)], ".0f"),
    "CV": _number("chunks.-1.cv", ".2f"),
    "wanted": _by_stage("rates.wanted", ".2f"),
    "achieved": _by_stage("rates.achieved", ".2f"),
    "largest overflow": _by_stage("overflow", ".1%"),
    "F1 space starts": _f1("agreement.whitespace"),
    "F1 word starts": _f1("agreement.words"),
}
NOTES = """\
± is the half-width of the 95% confidence interval of the mean over seeds (Student's t). FLOPs are
those of training as executed, at the boundary rate that the model reached. Chunks are those of the
innermost stage that chunks, or tokens. At equal FLOPs per byte a network that runs at every byte
has fewer parameters than one whose inner layers run once per chunk or token. Wanted and achieved
are positions per chunk of each stage, outermost first, on the held-out text; a rule is asked for no
rate. Overflow is the largest share of chunks that one training step clipped. F1 is agreement with
the starts of runs of white space, and of words, then that of as many random and of as many evenly
spaced boundaries."""


def tables(by_system: dict[str, list[Row]]) -> dict[str, Table]:
    """Title -> rows of cells, the header first."""
    found = {}
    for title, columns in (("Quality and cost", QUALITY), ("Chunks", CHUNKS)):
        body = [[cell(rows) for cell in columns.values()] for rows in by_system.values()]
        found[title] = [list(columns), *body]
    gold = {(file, kind): None for rows in by_system.values() for row in rows
            for file, kinds in row["gold"].items() for kind in kinds}  # fmt: skip
    if gold:
        header = ["system", *(f"{kind} in {file}" for file, kind in gold)]
        body = []
        for name, rows in by_system.items():
            own = [[row["gold"].get(file, {}).get(kind, []) for row in rows] for file, kind in gold]
            cells = [_f1("scores")([{"scores": score} for score in scores]) for scores in own]
            body.append([name, *cells])
        found["F1 with gold boundaries / random / evenly spaced"] = [header, *body]
    return found


# --- files ----------------------------------------------------------------------------------------


def write_report(folder: Path, rows: Sequence[Row], facts: dict[str, str]) -> None:
    """Write all files of a report, each in one move. facts: lines about the comparison."""
    by_system = grouped(rows)
    images = plots(by_system)
    content = {
        "RESULTS.md": markdown(by_system, facts).encode(),
        "results.html": page(by_system, facts, images).encode(),
        "results.json": (json_text({"facts": facts, "rows": list(rows)}, indent=1) + "\n").encode(),
        **images,
    }
    for name, data in content.items():
        replace_file(folder / name, data)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one move, since several workers may write it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def markdown(by_system: dict[str, list[Row]], facts: dict[str, str]) -> str:
    lines = ["# Comparison", ""]
    lines += [f"- {_plain(name)}: {_plain(value)}" for name, value in facts.items()]
    for title, table in tables(by_system).items():
        lines += ["", f"## {_plain(title)}", ""]
        for n, row in enumerate(table):
            lines.append(f"| {' | '.join(map(_plain, row))} |")
            if not n:
                lines.append("|---" * len(row) + "|")
    lines += ["", NOTES, "", "![bpb against FLOPs](bpb_flops.png)", ""]
    lines += ["![bpb against bytes per chunk](bpb_chunk.png)", "", "## Commands", ""]
    lines += ["Each trains one row by itself (other seeds: `--seed`).", "", "```sh"]
    lines += [printable(rows[0]["command"]) for rows in by_system.values()]
    return "\n".join([*lines, "```", ""])


def _plain(text: str) -> str:
    """Text of a Markdown table cell, without markup."""
    text = html.escape(printable(" ".join(text.split())), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|" else c for c in text)


STYLE = """\
body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.2em .7em;
text-align:right}td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;
overflow-wrap:anywhere;background:#f5f5f5;padding:.6em}img{max-width:100%}"""


def page(by_system: dict[str, list[Row]], facts: dict[str, str], images: dict[str, bytes]) -> str:
    """One HTML page without references to other files; all text is escaped."""
    parts = ["<!doctype html><meta charset=utf-8><title>Comparison</title>"]
    parts.append(f"<style>{STYLE}</style><h1>Comparison</h1><ul>")
    parts += [f"<li>{_html(name)}: {_html(value)}" for name, value in facts.items()]
    parts.append("</ul>")
    for title, (header, *body) in tables(by_system).items():
        head = "".join(f"<th>{_html(cell)}" for cell in header)
        rows = ["<tr>" + "".join(f"<td>{_html(cell)}" for cell in row) for row in body]
        parts += [f"<h2>{_html(title)}</h2><table><tr>{head}", *rows, "</table>"]
    parts.append(f"<p>{_html(NOTES)}</p>")
    for name, data in images.items():
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{_base64(data)}">')
    parts.append("<h2>Commands</h2><p>Each trains one row by itself (other seeds: --seed).</p>")
    parts += [f"<pre>{_html(rows[0]['command'])}</pre>" for rows in by_system.values()]
    samples = [(name, rows[0]["sample"]) for name, rows in by_system.items() if rows[0]["sample"]]
    if samples:
        parts.append("<h2>Samples</h2>")
        for name, text in samples:
            parts.append(f"<h3>{_html(name)}</h3><pre>{_html(text, keep=NEWLINE)}</pre>")
    return "\n".join(parts) + "\n"


def _html(text: str, keep: str = "") -> str:
    return html.escape(printable(text, keep=keep))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def plots(by_system: dict[str, list[Row]]) -> dict[str, bytes]:
    """PNG files: bits per byte against FLOPs per byte, and against bytes per chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {}
    for file, path, label, scale in (
        ("bpb_flops.png", "flops_per_byte", "training MFLOPs per byte", 1e-6),
        ("bpb_chunk.png", "chunks.-1.mean", "bytes per chunk", 1.0),
    ):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, rows in by_system.items():
            x = _mean(rows, path)
            x = 1.0 if x is None and file == "bpb_chunk.png" else x
            bpb = [row["bpb"] for row in rows]
            y = statistics.fmean(bpb)
            axes.errorbar([x * scale], [y], [interval(bpb)], fmt="o", ms=4, capsize=2, lw=1)
            label_of = printable(name).replace("$", r"\$")
            axes.annotate(label_of, (x * scale, y), (4, 4), textcoords="offset points", fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out bits per byte")
        axes.grid(alpha=0.3)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        found[file] = content.getvalue()
    return found
