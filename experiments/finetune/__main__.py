"""Fine-tuning a checkpoint on other text, against training from scratch on the same bytes.

    python -m experiments.finetune --init.from CHECKPOINT --text NAME=TRAIN:HELDOUT ...
        [--seeds N] [--section.field VALUE ...]

For each text and seed it trains the checkpoint's architecture on the same batches: from random
parameters, from the checkpoint's, with its innermost network frozen, and with all but its boundary
predictors frozen. Prints held-out bits per byte. Finished runs, in WORKDIR/NAME/SEED/ROW, are not
trained again, and the same command resumes the others.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hnet.command_line import OneLineParser, number, run
from hnet.data import open_corpus
from hnet.errors import ConfigError
from hnet.printable import printable
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.runtime.cpu import one_device_per_core
from hnet.train.command import train_to_end
from hnet.train.config import Config, InitConfig, MeshConfig
from hnet.train.metrics_file import read_metrics
from hnet.train.named import run_config
from hnet.train.workdir import check_workdir, claim_workdir, run_inputs

ROWS: dict[str, dict | None] = {
    "scratch": None,
    "tuned": {},
    "inner-frozen": {"freeze": ("main_network",)},
    "routers": {
        "freeze": ("embeddings", "lm_head", "encoder", "decoder", "residual_proj", "main_network")
    },
}
"""Fields of `init` of each row; None: from random parameters."""


def main() -> int:
    parser = OneLineParser(prog="python -m experiments.finetune", description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=TRAIN:HELDOUT")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=2, help="default 2")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="default: all")
    options, rest = parser.parse_known_args()
    base = run_config(rest)
    if not base.init.from_:
        raise ConfigError("init.from is empty: give the checkpoint to fine-tune")
    texts = dict(map(_text, options.text))
    if len(texts) < len(options.text):
        raise ConfigError(f"text={options.text}: two texts have one name: rename one")
    for name in texts:
        check_workdir(Path(base.workdir) / name)
    if base.mesh == MeshConfig():
        one_device_per_core(base.data.batch_size // base.train.accumulate)
    enable_compilation_cache()
    table = Table("text", *(escape(row) for row in options.rows), box=None)
    for name, (train, heldout) in texts.items():
        found = []
        for row in options.rows:
            of_seeds = []
            for seed in range(options.seeds):
                config = _config(base, name, train, heldout, row, seed)
                bpb = _finished(config)
                if bpb is None:
                    outcome = train_to_end(config)
                    if isinstance(outcome, int):
                        return outcome
                    bpb = outcome.evaluation.bpb
                of_seeds.append(f"{bpb:.4f}")
            found.append(" ".join(of_seeds))
        table.add_row(escape(name), *found)
    Console(highlight=False).print(table)
    return 0


def _text(word: str) -> tuple[str, tuple[str, str]]:
    """("Russian", ("ru.txt", "ru-heldout.txt")) of "Russian=ru.txt:ru-heldout.txt"."""
    name, _, files = word.partition("=")
    train, _, heldout = files.partition(":")
    if not (name.isidentifier() and train and heldout):
        raise ConfigError(
            f"text={word!r}: write NAME=TRAIN:HELDOUT, e.g. Russian=ru.txt:ru-new.txt"
        )
    return name, (train, heldout)


def _config(base: Config, name: str, train: str, heldout: str, row: str, seed: int) -> Config:
    fields = ROWS[row]
    return replace(
        base,
        workdir=str(Path(base.workdir) / name / str(seed) / row),
        seed=seed,
        data=replace(base.data, files=(train,), eval_files=(heldout,)),
        init=InitConfig() if fields is None else replace(base.init, **fields),
    )


def _finished(config: Config) -> float | None:
    """Held-out bits per byte of a run that ended; None if it has not. Settings that differ are
    printed. Raises ConfigError if it was trained on other text or another network."""
    if not (Path(config.workdir) / "config.json").exists():
        return None
    last = ([{}] + list(read_metrics(config.workdir)))[-1]
    if last.get("step") != config.train.steps:
        return None
    read = run_inputs(config, open_corpus(config.data))
    for line in claim_workdir(config, read, done=config.train.steps, ended=True):
        print(printable(line))
    return last.get("eval/bpb")


if __name__ == "__main__":
    run(main, trains=True)
