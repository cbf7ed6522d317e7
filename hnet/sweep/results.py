"""Results of a sweep: table of runs, one plot per field, HParams, and the best configuration."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hnet.dotted import with_fields
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.inspect.writer import RunWriter
from hnet.outputs import new_file, read_file
from hnet.sweep.interval import interval
from hnet.sweep.space import Range, describe
from hnet.sweep.study import Study

STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
RESULTS = ["results.csv", "results.parquet", "results.png", "best.json"]
console = Console(highlight=False, soft_wrap=True)


def result_rows(study: Study) -> list[dict[str, Any]]:
    """One flat row per run, one row per failed point; points in the order of their trials."""
    rows = []
    for trial in study.finished():
        values = study.space.values(trial.params)
        shown = {n: v if _is_plain(v) else json.dumps(v) for n, v in values.items()}
        point = {"point": trial.number, "state": STATES[trial.state], **shown}
        fault = trial.user_attrs.get("fault", "")
        for run in [{}] if fault else trial.user_attrs["runs"]:
            row = {**point, "seed": run.get("seed"), "step": run.get("step")}
            row["eval/bpb"] = run.get("bpb")
            for s, size in enumerate(run.get("bytes_per_chunk", ())):
                row[f"eval/stage{s}/bytes_per_chunk"] = size
            for s, lost in enumerate(run.get("overflow", ())):
                row[f"stage{s}/overflow_frac"] = lost
            rows.append({**row, "fault": fault, "study": study.study.study_name})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def check_results(out: Path, study: str = "") -> None:
    """Raise ConfigError if a folder contains files that `write_results` would replace but no sweep
    wrote, or another study did. study: name of the study, empty to allow any."""
    files = [out / name for name in RESULTS if os.path.lexists(out / name)]
    if not files:
        new_file(out / RESULTS[0], "out")
    elif not (out / RESULTS[0]).is_file() or not read_file(out / RESULTS[0], "out").startswith(
        b"point,state,"
    ):
        raise ConfigError(f"out={str(out)!r}: no sweep wrote its {files[0].name}: choose another")
    elif study and (others := _studies(out / RESULTS[0]) - {study}):
        raise ConfigError(
            f"out={str(out)!r} has the results of study {others.pop()!r}, not of {study!r}: use "
            "that --study, or another --out"
        )


def _studies(table: Path) -> set[str]:
    """Names of the studies in results.csv; earlier versions stored none."""
    rows = csv.DictReader(io.StringIO(read_file(table, "out").decode(errors="replace")))
    return {row["study"] for row in rows if row.get("study")}


def write_results(study: Study, out: Path) -> None:
    """Write all results so far, including those of other workers."""
    rows = result_rows(study)
    if not rows:
        return
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _replace(out / "results.csv", text.getvalue().encode())
    _write_parquet(rows, out / "results.parquet")
    _write_hparams(study, out / "tensorboard")
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        return
    _plot(study, done, out / "results.png")
    best = min((t for t in study.finished() if t.value is not None and t.state.name == "COMPLETE"),
               key=lambda t: t.value)  # fmt: skip
    values = study.space.values(best.params)
    config = with_fields(study.base, {**values, "workdir": str(out / "best")})
    _replace(out / "best.json", (json.dumps(to_json(config), indent=1) + "\n").encode())
    _show(study)
    console.print(escape(
        f"best: {best.value:.4f} bpb, {describe(values)}: "
        f"python -m experiments.pretrain {out / 'best.json'}"
    ))  # fmt: skip


def _show(study: Study, most: int = 10) -> None:
    """Print the best points."""
    table = Table("point", "eval/bpb", "bytes/chunk")
    done = [t for t in study.finished() if t.state == TrialState.COMPLETE]
    for trial in sorted(done, key=lambda t: t.value)[:most]:
        runs = trial.user_attrs["runs"]
        bpb = [run["bpb"] for run in runs]
        sizes = zip(*(run["bytes_per_chunk"] for run in runs))
        table.add_row(
            escape(describe(study.space.values(trial.params))),
            f"{trial.value:.4f}" + (f" ± {interval(bpb):.4f}" if len(bpb) > 1 else ""),
            " / ".join(f"{statistics.fmean(size):.2f}" for size in sizes) or "-",
        )
    console.print(table)
    if any(len(t.user_attrs["runs"]) > 1 for t in done):
        console.print("± is the 95% confidence interval of the mean over seeds")


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically, since several workers may write it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        console.print("results.parquet is left out: it needs the extra parquet")
        return
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, column in columns.items():  # each column has one type
        kinds = {type(v) for v in column if v is not None}
        if len(kinds) > 1:
            convert = float if kinds == {int, float} else str
            columns[name] = [v if v is None else convert(v) for v in column]
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content)
    _replace(path, content.getvalue())


def _write_hparams(study: Study, folder: Path) -> None:
    """One TensorBoard run per run, with its fields, curve and result; existing ones are kept.

    A run is renamed into place, so that an existing run is always complete.
    """
    folder.mkdir(exist_ok=True)
    for trial, values, run in _runs(study):
        name = re.sub(r"[^A-Za-z0-9_.=,-]+", "_", describe(values))[:80]
        place = folder / f"{trial.number:04}-{name}-seed={run['seed']}"
        if place.exists():
            continue
        unfinished = Path(tempfile.mkdtemp(prefix=".hparams-", dir=folder.parent))
        with RunWriter(unfinished) as writer:
            plain = {n: v if _is_plain(v) else json.dumps(v) for n, v in values.items()}
            writer.hparams({**plain, "seed": run["seed"]})
            for step, bpb in run["curve"]:
                if bpb is not None:
                    writer.scalars(step, {"eval/bpb": bpb})
            ends = {"eval/bpb": run["bpb"]}
            ends |= {
                f"eval/stage{s}/bytes_per_chunk": n for s, n in enumerate(run["bytes_per_chunk"])
            }
            writer.scalars(run["step"], {n: v for n, v in ends.items() if v is not None})
        try:
            unfinished.rename(place)
        except OSError:  # another worker was faster
            shutil.rmtree(unfinished)


def _runs(study: Study) -> Iterator[tuple]:
    for trial in study.finished():
        for run in trial.user_attrs.get("runs", ()):
            yield trial, study.space.values(trial.params), run


def _plot(study: Study, rows: list[dict[str, Any]], path: Path) -> None:
    """Plot bits per byte against each field: one mark per point, with its interval over seeds."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        with plt.rc_context({"text.parse_math": False}):
            _draw(study, rows, plt, path)
        return
    console.print("results.png is left out: it needs the extra sweep")


def _draw(study: Study, rows: list[dict[str, Any]], plt: Any, path: Path) -> None:
    points: dict[int, list[dict]] = {}
    for row in rows:
        points.setdefault(row["point"], []).append(row)
    names = list(study.space.choices) or ["seed"]
    figure, panels = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for name, panel in zip(names, panels[0]):
        xs = [runs[0][name] for runs in points.values()]
        bpb = [[run["eval/bpb"] for run in runs] for runs in points.values()]
        choice = study.space.choices.get(name)
        if not all(type(x) in (int, float) for x in xs):
            labels = list(dict.fromkeys(map(str, xs)))
            panel.set_xticks(range(len(labels)), labels)
            xs = [labels.index(str(x)) for x in xs]
        elif isinstance(choice, Range) and choice.log or min(xs) > 0 and max(xs) >= 20 * min(xs):
            panel.set_xscale("log")
        means, bars = [statistics.fmean(b) for b in bpb], [interval(b) for b in bpb]
        panel.errorbar(xs, means, bars, fmt="o", ms=4, capsize=2, lw=1)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    seeds = len(next(iter(points.values())))
    note = f"mean and 95% interval over {seeds} seeds" if seeds > 1 else "one seed"
    panels[0][0].set_ylabel(f"held-out bits per byte\n({note})")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    _replace(path, content.getvalue())
