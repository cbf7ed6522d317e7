"""Train systems at equal cost on the same bytes and put them into one table.

    python -m experiments.compare NAME NAME ... --data.files 'a/*.txt' --data.eval_files b.txt

NAME is a named configuration (`pretrain --list`), a .json file or package.module:function, or a
token baseline: bpe, unigram, superbpe (--vocabulary tokens, learned from the training text; scored
in bits per source byte). All systems are trained with the same settings and seeds; the widths of
each are chosen so that it costs what the --reference system costs at --size (--match flops,
parameters or bytes_per_second).

WORKDIR gets one folder per system and seed, RESULTS.md, results.html, results.json and two plots.
The same command again resumes; started several times, also on other machines that see WORKDIR, it
shares the systems among the processes. Further names add systems; without names it only writes the
tables of what is finished. Exit codes: 0 done, 1 a system failed, 2 bad input, 75 asked to stop and
saved.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from hnet.bounds import Bounds, FilePath, Natural, Repeats, Vocabulary
from hnet.data.config import DataConfig
from hnet.train.sections import (
    CheckpointConfig,
    EvalConfig,
    OptimConfig,
    Sections,
    TrainConfig,
)

SIZES = {"tiny": 100_000, "small": 750_000, "base": 3_000_000}
"""Parameters of the reference system by name of the size."""


@dataclass(frozen=True)
class Compare(Sections):
    """What is compared, at which cost, and the settings that all runs share."""

    workdir: str = "runs/compare"
    """folder of all runs and of the tables; the same command again resumes"""
    match: Literal["flops", "parameters", "bytes_per_second"] = "flops"
    """cost that is equal for all systems: training FLOPs per source byte at the expected boundary
    rate, parameters, or measured training bytes per second on this machine"""
    size: Literal["tiny", "small", "base"] = "small"
    """number of parameters of the reference system: 0.1M, 0.75M or 3M"""
    reference_parameters: Natural = 0
    """number of parameters of the reference system; 0 = by size"""
    reference: str = "hnet"
    """named configuration whose cost at this size is the cost of all systems"""
    seeds: Annotated[int, Bounds(1, 64)] = 3
    """number of runs of each system, with seeds from `seed` on; several are one program"""
    bytes: Natural = 1_048_576
    """number of training bytes per run; 0 = train.steps updates"""
    vocabulary: Vocabulary = 1024
    """number of tokens of the token baselines, which are learned from the training text"""
    gold: tuple[FilePath, ...] = ()
    """annotated files with gold words or morphemes, as `experiments.boundaries` reads them"""
    passages: Annotated[int, Bounds(1, 100_000)] = 64
    """number of held-out passages whose boundaries are measured"""
    passage_bytes: Annotated[int, Bounds(16, 1 << 20)] = 500
    """number of bytes per passage, at most; annotated texts are cut to it"""
    samples: Repeats = 8
    """number of texts that are generated to measure decoding"""
    sample_bytes: Annotated[int, Bounds(1, 1 << 20)] = 64
    """number of bytes per generated text"""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig(learning_rate=2e-3)
    train: TrainConfig = TrainConfig(steps=256, rows_sharing_slots=8)
    eval: EvalConfig = EvalConfig(every=0)
    checkpoint: CheckpointConfig = CheckpointConfig(every=100, keep=1)

    @property
    def parameters(self) -> int:
        return self.reference_parameters or SIZES[self.size]


LOCAL = ("workdir", "mesh", "distributed", "watchdog", "checkpoint", "profile")
"""Fields in which the workers of one comparison may differ."""
