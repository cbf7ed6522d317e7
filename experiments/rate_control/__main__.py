"""The controller against a rate loss of fixed weight, at the rate that the fixed weight achieves.

    python -m experiments.rate_control [NAME] [--section.field VALUE ...]

Trains a configuration with one route (default: mixed_scripts_single) without `hold_rate`, in
WORKDIR/fixed, and again, on the same batches and from the same parameters, with `hold_rate` at the
rates that the first run has on the held-out text, in WORKDIR/held. Prints the results of both on
the held-out text. The same command again resumes. About 4 minutes on two CPU cores.
"""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from hnet.command_line import run
from hnet.errors import ConfigError
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.train.command import train_to_end
from hnet.train.config import Config
from hnet.train.evaluate import Evaluation
from hnet.train.named import run_config


def main() -> int:
    base = run_config(default="mixed_scripts_single")
    if base.model.num_routes > 1 or not base.model.num_chunked:
        raise ConfigError("model: the rates of one route are compared: use a model with one route")
    enable_compilation_cache()
    table = Table("rate", "stage", "target", "achieved", "off", "bits per byte", box=None)
    targets = [stage.chunking.target_ratio for stage in base.model.stages[:-1]]
    for name in "fixed", "held":
        settings = with_targets(base, name, targets)
        outcome = train_to_end(settings)
        if isinstance(outcome, int):
            return outcome
        achieved = ratios(outcome.evaluation)
        for s, (size, target) in enumerate(zip(achieved, targets)):
            off, bpb = f"{size / target - 1:+.1%}", f"{outcome.evaluation.bpb:.4f}"
            table.add_row(name, str(s), f"{target:.3f}", f"{size:.3f}", off, bpb)
        targets = achieved
    Console(highlight=False).print(table)
    return 0


def with_targets(base: Config, name: str, targets: list[float]) -> Config:
    """The run in WORKDIR/name with these targets (positions per chunk); "held" uses hold_rate."""
    *outer, inner = base.model.stages
    stages = [
        replace(stage, chunking=replace(stage.chunking, target_ratio=N, hold_rate=name == "held"))
        for stage, N in zip(outer, targets)
    ]
    model = replace(base.model, stages=(*stages, inner))
    return replace(base, workdir=f"{base.workdir}/{name}", model=model)


def ratios(evaluation: Evaluation) -> list[float]:
    """Positions per chunk of each stage."""
    sizes = [evaluation.bytes_per_chunk(s) for s in range(len(evaluation.chunks_by_stage))]
    return [round(size / outer, 4) for size, outer in zip(sizes, [1.0, *sizes])]


if __name__ == "__main__":
    run(main, trains=True)
