"""Fixed numbers of chunk slots against slots that follow the counts.

    python -m experiments.slots [NAME] [--shares 2 4 6 8] [--seeds N] [--section.field VALUE ...]

Trains NAME (default: a small T3, T6, T3 with target 6) once with the slots of `hnet.train.capacity`
and once per share k with L/k slots per row, which never change: chunks that do not fit are clipped
in training, and in the score "clipped" too. Prints held-out bits per byte with all slots and with
those of training, the share of clipped chunks, and bytes per second without compilation. Finished
rows, in WORKDIR/rows, are not trained again.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from experiments.compare.report import replace_file
from experiments.configs import default
from hnet.command_line import OneLineParser, number, run
from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.data import Corpus, eval_batches, open_corpus, train_batches
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text, read_object
from hnet.outputs import local_folder
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.sweep.interval import interval
from hnet.train.compiled_run import build, put_batch, put_whole_batch, run_evaluation
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.named import run_config

FOLLOW = 0  # the share of the row whose slots follow the counts
COLUMNS = ("bpb", "bpb_clipped", "clipped", "bytes_per_second")


def network() -> HNetConfig:
    """Attention in all three stacks, T3, T6 and T3, with target 6."""
    outer = StageConfig(
        ("T3", "T3"), 64, 128, num_heads=4, rotary_emb_dim=8, chunking=ChunkingConfig(6.0)
    )
    main = StageConfig(("T6",), 96, 256, num_heads=4, rotary_emb_dim=12)
    return replace(default.config().model, stages=(outer, main))


def main() -> int:
    parser = OneLineParser(prog="python -m experiments.slots", description=__doc__)
    parser.add_argument(
        "--shares", nargs="+", type=number(int, 1, 1024), default=[2, 4, 6, 8], help="of a row"
    )
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=3, help="default 3")
    options, rest = parser.parse_known_args()
    base = run_config(rest, default=f"{network.__module__}:{network.__name__}")
    if "--workdir" not in rest:
        base = replace(base, workdir="runs/slots")
    if base.model.num_chunked != 1:
        raise ConfigError("model: slots of one stage are compared: use a model with two stages")
    folder = local_folder(base.workdir, "workdir") / "rows"
    enable_compilation_cache()
    corpus = open_corpus(base.data)
    table = Table("slots", "seeds", *COLUMNS, box=None)
    for share in (FOLLOW, *options.shares):
        rows = []
        for seed in range(base.seed, base.seed + options.seeds):
            rows.append(row_of(replace(base, seed=seed), corpus, share, folder))
        name = f"L/{share}" if share else "follow the counts"
        table.add_row(name, str(len(rows)), *(cell(rows, column) for column in COLUMNS))
    Console(highlight=False, width=100).print(table)
    return 0


def cell(rows: list[dict[str, float]], column: str) -> str:
    """Mean and half-width of the 95% confidence interval over seeds."""
    values = [math.nan if row[column] is None else row[column] for row in rows]
    return f"{statistics.fmean(values):.4g} ± {interval(values):.2g}"


def share_of_sums(parts: Sequence[tuple[float, float]]) -> float:
    """Sum of the first numbers of some pairs over that of the second ones; 0 if that is 0."""
    part, whole = map(math.fsum, zip(*parts))
    return part / whole if whole else 0.0


def row_of(config: Config, corpus: Corpus, share: int, folder: Path) -> dict[str, float]:
    """The stored row of these settings, or a new one. Raises ConfigError for other settings."""
    path = folder / f"share{share}-seed{config.seed}.json"
    settings = to_json(config) | {"workdir": ""}
    if path.exists():
        kinds = {"settings": dict, "fingerprint": str, "row": dict}
        content = read_object(path, "row of the study of slots", **kinds)
        if content["settings"] != settings or content["fingerprint"] != corpus.fingerprint:
            raise ConfigError(f"workdir: {str(path)!r} has other settings or text: use another")
        return content["row"]
    row = train(config, corpus, share)
    content = {"settings": settings, "fingerprint": corpus.fingerprint, "row": row}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json_text(content, indent=1) + "\n").encode())
    return row


def train(config: Config, corpus: Corpus, share: int) -> dict[str, float]:
    """Train with L/share slots per row, or with slots that follow the counts (FOLLOW)."""
    if share:  # rows do not share slots: each has its own L/share
        config = replace(config, train=replace(config.train, rows_sharing_slots=1))
    program = build(config)
    state, ladder = program.init(), program.ladder
    fixed = (math.ceil(config.data.seq_len / share),) if share else None
    positions = config.data.batch_size * config.data.seq_len
    lost, seconds, before = [], [], None
    with train_batches(corpus, config.data, seed=config.seed) as batches:
        for _ in range(config.train.steps):
            capacities = fixed or ladder.capacities
            batch, began = put_batch(next(batches), program.mesh), time.perf_counter()
            state, metrics = program.step(state, batch, program.hparams, capacities=capacities)
            metrics = jax.device_get(metrics)
            if capacities == before:  # otherwise it has been compiled
                seconds.append(time.perf_counter() - began)
            before = capacities
            chunks = float(metrics["stage0/chunks"])
            lost.append((chunks * float(metrics["stage0/overflow_frac"]), chunks))
            ladder = ladder.observe((int(metrics["stage0/max_slots"]),))
    whole = run_evaluation(program, state.params, corpus.heldout, config, (None,))
    clipped = Evaluation()
    for batch in eval_batches(corpus.heldout, config.data):
        fed = put_whole_batch(batch, program.mesh)
        found = program.evaluate(state.params, fed, capacities=fixed or (None,))
        clipped.add(batch, jax.device_get(found))
    return {
        "bpb": whole.bpb,
        "bpb_clipped": clipped.bpb,
        "clipped": share_of_sums(lost[len(lost) // 2 :]),
        "bytes_per_second": positions / statistics.median(seconds) if seconds else math.nan,
    }


if __name__ == "__main__":
    run(main, trains=True)
