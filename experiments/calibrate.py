"""Find the target ratio per route that makes the number of chunks equal in all languages.

    python -m experiments.calibrate --files eng=eng.txt rus=rus.txt --mean-ratio 6 --out routed.json
    python -m experiments.pretrain routed.json --data.files eng.txt rus.txt

The files are aligned line by line; for comparable text without aligned lines, use --aligned False:
then only the totals per file are equal. The mean ratio is all bytes over all chunks of the text.
Prints the table and the settings; --out writes a complete configuration, made from --base. Only
stage 0 gets a target per route: its chunks are then equally many in all languages, so the inner
stages keep a single target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hnet.bounds import ChunkBytes, FilePath
from hnet.chunking.targets import equal_chunk_ratios
from hnet.command_line import parse, run
from hnet.data.parallel import Lines, bytes_by_script, read_parallel
from hnet.data.scripts import SCRIPTS, route_table
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.files import json_text
from hnet.outputs import new_file, write_new
from hnet.printable import printable
from hnet.train.config import Config
from hnet.train.named import base_config

COMMON_TO_ALL = ("Common", "Unknown")
LEAST_SHARE = 0.02  # least share of a language's bytes for a script to get a route by default


@dataclass(frozen=True)
class CalibrateConfig:
    """Which text to calibrate on, and for which mean ratio."""

    files: tuple[str, ...]
    """LANGUAGE=FILE for each language, one text per line; or .jsonl with "text\""""
    mean_ratio: ChunkBytes
    """bytes per chunk of the whole text, over all languages"""
    groups: tuple[str, ...] = ()
    """scripts that share a route, such as Hiragana+Katakana; all others share the default route,
    which gets Latin's target if Latin has a route. Empty = one route per script of the text"""
    aligned: bool = True
    """whether line i says the same in every file; False: only the files as a whole do"""
    base: str = "default"
    """named configuration or .json file to which the routes are added"""
    out: FilePath | None = None
    """output file for the configuration; it must not exist"""


@dataclass(frozen=True)
class Calibration:
    """Target ratios found for a parallel text."""

    route_groups: tuple[tuple[str, ...], ...]
    target_ratios: tuple[float, ...]
    """targets of the default route, then of each group"""
    bytes_LR: np.ndarray
    """bytes of each language on each route"""

    @property
    def chunks_L(self) -> np.ndarray:
        """Number of chunks of each language at these targets."""
        return self.bytes_LR @ (1 / np.asarray(self.target_ratios))


def calibrate(lines: Lines, mean_ratio: float, groups: Sequence[Sequence[str]] = ()) -> Calibration:
    """Target ratio of each route for a parallel text.

    If Latin has a route, no script of this text is left for the default route. The default route
    then gets Latin's target, for scripts that do not occur in this text.
    Raises ConfigError for a group that names no script, or a mean ratio too small for a language.
    """
    scripts_LX = np.stack([bytes_by_script(texts) for texts in lines.values()])
    groups = tuple(tuple(group) for group in groups) or _own_routes(scripts_LX)
    route_of = route_table(groups, "groups")
    bytes_LR = np.zeros((len(lines), len(groups) + 1), np.int64)
    np.add.at(bytes_LR.T, route_of, scripts_LX.T)
    ratios = equal_chunk_ratios(bytes_LR, mean_ratio)
    if not ratios.min() > 1:
        raise ConfigError(
            f"mean_ratio={mean_ratio} asks for {ratios.min():.2f} bytes per chunk in one of the "
            f"routes: use at least {1.01 * mean_ratio / ratios.min():.2f}"
        )
    if route_of[SCRIPTS.index("Latin")]:
        ratios[0] = ratios[route_of[SCRIPTS.index("Latin")]]
    return Calibration(groups, tuple(round(float(N), 3) for N in ratios), bytes_LR)


def _own_routes(scripts_LX: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """Every script that makes up at least LEAST_SHARE of some language's bytes."""
    share_X = (scripts_LX / np.maximum(scripts_LX.sum(axis=1, keepdims=True), 1)).max(axis=0)
    names = [SCRIPTS[i] for i in np.flatnonzero(share_X >= LEAST_SHARE)]
    return tuple((name,) for name in names if name not in COMMON_TO_ALL)


def with_routes(base: Config, found: Calibration) -> Config:
    """`base` with these routes and targets in stage 0, and routes in the stages that had some.

    If no script of the text is left for the default route, it is fitted after training.
    """
    model = base.model
    if not model.num_chunked:
        raise ConfigError("base: its model cuts nothing: use one with at least two stages")
    routes, stages = len(found.target_ratios), list(model.stages)
    for s, stage in enumerate(stages[:-1]):
        changes = {"routes": routes, "route_target_ratios": found.target_ratios if s == 0 else ()}
        if s == 0 or stage.chunking.routes > 1:
            stages[s] = replace(stage, chunking=replace(stage.chunking, **changes))
    has_latin = any("Latin" in group for group in found.route_groups)
    cuts = [stage.chunking for stage in stages[:-1]]
    holds = any(cut.hold_rate and cut.num_predictors > 1 for cut in cuts)
    return replace(
        base,
        model=replace(model, stages=tuple(stages), route_groups=found.route_groups),
        rate_control=replace(base.rate_control, fit_default=has_latin and holds),
    )


def main() -> None:
    config = parse(CalibrateConfig)
    if config.out is not None:
        new_file(config.out, "out")
    base = base_config(config.base)
    lines = read_parallel(config.files, aligned=config.aligned)
    groups = [tuple(group.split("+")) for group in config.groups]
    found = calibrate(lines, config.mean_ratio, groups)
    routed = with_routes(base, found)
    _print(found, lines)
    if config.out is not None:
        content = to_json(replace(routed, workdir=f"runs/{Path(config.out).stem}"))
        write_new(config.out, json_text(content, indent=1) + "\n", "out")
        print(f"wrote {config.out}")


def _print(found: Calibration, lines: Lines) -> None:
    console = Console(highlight=False)
    languages = Table("language", "texts", "bytes per text", "chunks per text", box=None)
    for language, chunks, num_bytes in zip(lines, found.chunks_L, found.bytes_LR.sum(axis=1)):
        count = len(lines[language])
        figures = f"{count:,}", f"{num_bytes / count:.1f}", f"{chunks / count:.2f}"
        languages.add_row(Text(printable(language)), *figures)
    routes = Table("route", "share of the text", "bytes per chunk", box=None)
    names = ("default", *("+".join(group) for group in found.route_groups))
    share_R = found.bytes_LR.sum(axis=0) / found.bytes_LR.sum()
    for name, share, ratio in zip(names, share_R, found.target_ratios):
        routes.add_row(name, f"{share:.2%}", f"{ratio:.3f}")
    console.print(languages, "", routes)


if __name__ == "__main__":
    run(main)
