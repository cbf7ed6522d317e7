"""Train the points of a space and compare them.

    python -m experiments.sweep [NAME] --space FILE [--out runs/sweep] [--section.field VALUE ...]

NAME and fields are those of `experiments.pretrain`; FILE is TOML, see `hnet/sweep/space.py`. Runs
that differ only in traced numbers and seeds (learning rate, weight decay, multipliers, target
ratios, weights of rate losses, gain of the controller) are trained inside one program, up to
--width of them, spread over the devices; all others one after the other. Points are claimed in an
Optuna storage: start the same command on several machines with one --storage (a shared journal file
or the URL of a database) and they share the work. The same command again resumes: finished points
stay, interrupted ones continue from their checkpoints.

OUT gets results.csv and .parquet, one plot per field, tensorboard/ (HParams), and best.json, a
configuration for `pretrain`. Exit codes: 0 done, 1 no point could be trained, 2 bad input, 75 asked
to stop and saved.
"""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from hnet.command_line import FAILED, OneLineParser, end_without, file_path, number, run
from hnet.data import Corpus, open_corpus, train_batches
from hnet.data.identity import Inputs, inputs
from hnet.errors import ConfigError
from hnet.outputs import local_folder
from hnet.printable import printable
from hnet.runtime.compile_cache import CompilationLog, enable_compilation_cache
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from hnet.runtime.stop_request import StopRequest

try:
    from optuna.trial import TrialState
except ModuleNotFoundError:
    end_without("optuna", extra="sweep")

from hnet.sweep.results import check_results, write_results
from hnet.sweep.space import Point, Space, describe, list_points, read_space
from hnet.sweep.study import Claim, Study
from hnet.sweep.train import Options, train_points
from hnet.train.config import Config
from hnet.train.initial_weights import open_weights
from hnet.train.named import run_config
from hnet.train.run_logger import RunLogger, Start

IDLE_SECONDS = 2.0  # between two checks for points that other workers may have left
console = Console(highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m experiments.sweep", description=__doc__)
    parser.add_argument("--space", type=file_path, required=True, metavar="FILE", help="TOML")
    parser.add_argument(
        "--out", type=file_path, default="runs/sweep", metavar="DIR", help="default %(default)s"
    )
    parser.add_argument(
        "--storage", type=file_path, metavar="FILE_OR_URL", help="default: OUT/journal.log"
    )
    parser.add_argument("--study", metavar="NAME", help="in the storage; default: name of OUT")
    parser.add_argument(
        "--width", type=number(int, 1, 100_000), default=32, help="runs in one program (default 32)"
    )
    parser.add_argument(
        "--heartbeat-timeout", type=number(float, 0.01, 1e6), default=120.0, metavar="SECONDS",
        help="silence after which another worker counts as dead (default 120)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show points and groups, end")
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    base = run_config(rest)
    space, out = read_space(options.space, base), local_folder(options.out, "out")
    worker = Options(out, options.width, options.heartbeat_timeout)
    if options.dry_run:
        _show_plan(base, space, worker)
        return 0
    name = options.study or out.resolve().name
    check_results(out, name)
    storage = options.storage or str(out / "journal.log")
    read = _check_starts(base, space)
    study = Study(storage, name, base, space, worker.timeout, read)
    enable_compilation_cache()
    compiled = CompilationLog()
    with StopRequest() as stop, study:
        done = _work(study, worker, stop)
        programs = sum("parallel_step" in e.name or "train_step" in e.name
                       for e in compiled.entries)  # fmt: skip
        console.print(f"compiled or loaded {programs} training programs")
        write_results(study, out)
    if not done:
        console.print("stopped and saved: the same command goes on")
        return REQUEUE_EXIT_CODE
    return FAILED if all(trial.state == TrialState.FAIL for trial in study.finished()) else 0


def _check_starts(base: Config, space: Space) -> Inputs:
    """Fingerprints of the text of `base`. Raises ConfigError if a run would be refused.

    Looks at the text, tokenizer or labels, probe files, tracker and weights of every listed point.
    """
    corpora: dict[str, Corpus] = {}

    def check(config: Config) -> None:
        text = repr(config.data)
        if text not in corpora:
            corpora[text] = open_corpus(config.data)
            groups = config.model.route_groups
            train_batches(corpora[text], config.data, seed=0, route_groups=groups).close()
        RunLogger(config, corpora[text], Start())
        if config.init.from_:
            open_weights(config.init.from_, config.init.ema)

    check(base)
    seen = {_read_by(base)}
    for point in list_points(base, space) or ():
        config = point.runs[0]
        if _read_by(config) in seen:
            continue
        seen.add(_read_by(config))
        try:
            check(config)
        except ConfigError as e:
            raise ConfigError(f"{describe(point.values)}: {e}") from None
    return inputs(base.data, corpora[repr(base.data)])


def _read_by(config: Config) -> str:
    """The settings that name files or outside services."""
    return repr((config.data, config.eval, config.init, config.tracker, config.profile))


def _show_plan(base: Config, space: Space, options: Options) -> None:
    """Print the points of each program; for tpe, the ranges they are drawn from."""
    points = list_points(base, space)
    seeds = len(space.seeds) or 1
    if points is None:
        console.print(f"{space.trials} points x {seeds} seeds, chosen by tpe on the way, from")
        for name, distribution in space.distributions().items():
            console.print(escape(printable(f"  {name}: {distribution}")))
        return
    width = max(1, options.width // seeds)
    programs = _programs(points, width)
    for n, group in enumerate(programs, 1):
        together = "in one program" if len(group) * seeds > 1 else "as a run of its own"
        console.print(f"{n}. {len(group)} points x {seeds} seeds {together}")
        for point in group:
            console.print(escape(f"     {describe(point.values)}"))
    console.print(f"{len(points)} points, {len(points) * seeds} runs, {len(programs)} programs")


def _programs(points: Sequence[Point], width: int) -> list[list[Point]]:
    groups: list[list[Point]] = []
    for point in points:
        full = not groups or len(groups[-1]) == width or groups[-1][0].group != point.group
        if full:
            groups.append([])
        groups[-1].append(point)
    return groups


def _work(study: Study, options: Options, stop: StopRequest) -> bool:
    """Train points until none is left, including those of dead workers; False if asked to stop."""
    limit = max(1, options.width // (len(study.space.seeds) or 1))
    if study.points is None:
        limit = min(limit, study.space.parallel)
    while not stop.stop_requested(0):
        claims = study.claim(limit)
        if not claims:
            if not study.is_pending():
                return True
            time.sleep(min(IDLE_SECONDS, study.timeout / 4))
            continue
        groups: dict[str, list[Claim]] = {}
        for claim in claims:
            groups.setdefault(claim.point.group, []).append(claim)
        left = list(groups.values())
        while left:
            if not train_points(study, left[0], options, stop):
                study.release(claim for group in left for claim in group)
                return False
            left.pop(0)
            console.print(f"{study.num_done()} of {study.num_points} points are done")
    return False


if __name__ == "__main__":
    run(main, trains=True)
