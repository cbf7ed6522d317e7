"""The model card of a folder for the Hub, made of what a run wrote about itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hnet.config import HNetConfig
from hnet.printable import printable
from hnet.train.config import Config

_FRONT = """---
library_name: hnet-jax
pipeline_tag: text-generation
tags:
- byte-level
- dynamic-chunking
- h-net
- jax
---
"""


def make_card(
    name: str,
    model: HNetConfig,
    num_parameters: int,
    *,
    run: Config | None = None,
    step: int | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown. name: owner/name on the Hub; run, step and rows (of metrics.jsonl): of a training
    run, if the weights are of one. Folders of this machine are left out."""
    sizes = ", ".join(f"{s.d_model} ({' '.join(s.arch_layout)})" for s in model.stages)
    facts = {
        "parameters": f"{num_parameters:,}",
        "stages, outermost first": f"width (layers): {sizes}",
    }
    if run is not None:
        facts |= _of_run(run, step, rows)
    table = ["| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in facts.items())]
    lines = [
        _FRONT,
        f"# {_cell(name.partition('/')[2] or name)}\n",
        "A byte-level language model that learns where to cut its text into chunks "
        "([H-Net](https://arxiv.org/abs/2507.07955)).\n",
        *table,
        "\n```python\nfrom hnet import load\n",
        f'model = load("hf://{printable(name)}")\n```',
    ]
    return "\n".join(lines) + "\n"


def _of_run(run: Config, step: int | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Training text by file name, and the figures of the last evaluation up to the step."""
    facts = {
        "trained on": ", ".join(Path(pattern).name for pattern in run.data.files),
        "updates": f"{step:,} of {run.train.steps:,}",
        "seed": str(run.seed),
    }
    seen = [row for row in rows if _is_number(row.get("step")) and row["step"] <= step]
    if seen and _is_number(seen[-1].get("bytes_seen")):
        facts["bytes seen"] = f"{seen[-1]['bytes_seen']:,}"
    tested = next((row for row in reversed(seen) if _is_number(row.get("eval/bpb"))), None)
    if tested:
        at = f" (update {tested['step']:,})"
        facts["held-out bits per byte"] = f"{tested['eval/bpb']:.4f}{at}"
        for s in range(run.model.num_chunked):
            size = next(
                (
                    tested[k]
                    for k in (f"eval/stage{s}/bytes_per_chunk", f"stage{s}/bytes_per_chunk")
                    if k in tested
                ),
                None,
            )
            if _is_number(size):
                facts[f"bytes per chunk, stage {s}"] = f"{size:.2f}{at}"
    return facts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _cell(text: str) -> str:
    """Text of a table, which can be no markup."""
    safe = printable(text)
    for char in "\\`*_[]<>|&":
        safe = safe.replace(char, f"&#{ord(char)};")
    return safe
