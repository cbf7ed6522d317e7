"""Claims of papers about ways to chunk, as one table: what holds at a small size.

    python -m experiments.claims --workdir runs/claims --data.files 'train/*.txt' \\
        --data.eval_files heldout.txt

Trains the systems that the claims name by `experiments.compare`, whose settings these are (a folder
of a comparison with the same settings is continued), and writes CLAIMS.md there. A claim says that
one system has fewer held-out bits per byte than another. It "holds" if the 95% confidence interval
of the difference of means over seeds (Welch) lies below 0, "does not hold" if above, else this size
"cannot tell". --report writes the table from finished runs only; --robustness N adds the byte
accuracy that remains under the perturbations of `evaluate --suite perturb` on N passages.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.compare import __main__ as compare
from experiments.compare.report import grouped, read_row, replace_file
from hnet import load
from hnet.command_line import OneLineParser, file_path, number, run
from hnet.data import open_corpus
from hnet.errors import ConfigError
from hnet.suites import command, perturb
from hnet.suites.items import Settings
from hnet.suites.scorer import ModelScorer
from hnet.sweep.interval import interval
from hnet.train.workdir import check_text, read_config

NAMES = (
    "hnet", "bytes_transformer", "bpe", "superbpe", "hnet_space", "spacebyte",
    "experiments.claims:two_stages", "experiments.claims:no_smoothing",
    "experiments.claims:no_straight_through", "experiments.claims:transformer_ends",
    "rl_tokenisation",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One system has fewer bits per byte than another at equal cost."""

    text: str
    source: str
    there: str
    """setting and outcome in the source"""
    better: str
    worse: str


CLAIMS = (
    Claim("H-Net is better than a Transformer over bytes", "arXiv 2507.07955",
          ".755 against .859 (L)", "hnet", "bytes_transformer"),
    Claim("H-Net is better than BPE", "arXiv 2507.07955",
          ".755 against .756 (L), .743 with two stages", "hnet", "bpe"),
    Claim("two stages are better than one", "arXiv 2507.07955", ".743 against .755 (L)",
          "experiments.claims:two_stages", "hnet"),
    Claim("smoothing helps", "arXiv 2507.07955", "ablation with 36B tokens, a figure",
          "hnet", "experiments.claims:no_smoothing"),
    Claim("the straight-through gradient of confidence helps", "arXiv 2507.07955",
          "ablation with 36B tokens, a figure", "hnet", "experiments.claims:no_straight_through"),
    Claim("Mamba-2 is better than attention around the main network", "arXiv 2507.07955",
          "ablation with 36B tokens, a figure", "hnet", "experiments.claims:transformer_ends"),
    Claim("with one stage, spaces are better boundaries than learned ones", "arXiv 2507.07955",
          ".755 and .755 (L), .726 against .728 (XL)", "hnet_space", "hnet"),
    Claim("boundaries at spaces are better than none", "arXiv 2404.14408",
          "SpaceByte against a Transformer over bytes", "spacebyte", "bytes_transformer"),
    Claim("score-function boundaries are better than cosine", "arXiv 2602.13940",
          "not worse than H-Net with 100M parameters", "rl_tokenisation", "hnet"),
    Claim("superwords are better than BPE", "arXiv 2503.13423",
          "8B parameters, vocabulary of 200k; on tasks, not in bits per byte", "superbpe", "bpe"),
)  # fmt: skip


def difference(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float]:
    """(difference of means, half-width of its 95% confidence interval by Welch's t).

    The half-width is infinite if one of them has a single value.
    """
    from scipy.stats import t

    parts = [(statistics.variance(v) / len(v) if len(v) > 1 else math.inf, len(v) - 1)
             for v in (better, worse)]  # fmt: skip
    variance = sum(part for part, _ in parts)
    off = statistics.fmean(better) - statistics.fmean(worse)
    if not 0 < variance < math.inf:
        return off, variance
    free = variance**2 / sum(part**2 / n for part, n in parts)
    return off, float(t.ppf(0.975, free)) * math.sqrt(variance)


def verdict(off: float, half: float) -> str:
    """Whether a difference that should be negative is."""
    if off + half < 0:
        return "holds"
    return "does not hold" if off - half > 0 else "cannot tell at this size"


def table(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Head and rows of all claims. found: the rows of a comparison, one per system and seed."""
    by_system = grouped(found)
    rows = [["claim", "source", "there", "here", "outcome", "verdict"]]
    for claim in CLAIMS:
        here = outcome = judged = "not run"
        if claim.better in by_system and claim.worse in by_system:
            both = [by_system[claim.better], by_system[claim.worse]]
            better, worse = ([row["bpb"] for row in own] for own in both)
            off, half = difference(better, worse)
            sizes = " and ".join(f"{own[0]['parameters'] / 1e6:.2f}M" for own in both)
            text = both[0][0]["train_bytes"] / 1e6
            here = f"{sizes} parameters, {text:.2f} MB, {len(better)} and {len(worse)} seeds"
            means = f"{statistics.fmean(better):.3f} against {statistics.fmean(worse):.3f}"
            outcome, judged = f"{means} ({off:+.3f} ± {half:.3f})", verdict(off, half)
        rows.append([claim.text, claim.source, claim.there, here, outcome, judged])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *others]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def robustness(folder: Path, passages: int) -> list[list[str]]:
    """Head and rows: percentage of byte accuracy above chance that remains, mean over seeds.

    Only for the systems that claims name; token systems are left out, as suites ask for bytes.
    """
    remains: dict[str, list[list[float | None]]] = {}
    for path in sorted(folder.glob("*/seed*/row.json")):
        system, config = read_row(path)["system"], read_config(str(path.parent))
        if system not in NAMES or config.data.tokenizer:
            continue
        settings, corpus = Settings(passages, max_bytes=256), open_corpus(config.data)
        check_text(path.parent, config.data, corpus)
        texts = command.passages(corpus.heldout, settings)
        scorer = ModelScorer(load(str(path.parent)), batch_size=8)
        report = perturb.run(scorer, replace(settings, texts=texts))["perturb"]
        remains.setdefault(system, []).append([row["byte_robustness"] for row in report])
    rows = [["system", "seeds", *perturb.PERTURBATIONS]]
    for system, seeds in remains.items():
        rows.append([system, str(len(seeds)), *map(percentage, zip(*seeds))])
    return rows


def percentage(values: Sequence[float | None]) -> str:
    """Mean and half-width of its 95% confidence interval; "-" if a seed has no value."""
    if None in values:
        return "-"
    return f"{statistics.fmean(values):.0f} ± {interval(values):.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m experiments.claims", description=__doc__)
    parser.add_argument(
        "--workdir", type=file_path, default="runs/claims", help="default: runs/claims"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--robustness", type=number(int, 0, 10_000), default=0, metavar="N")
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    folder = Path(options.workdir)
    code = 0 if options.report else compare.main([*NAMES, "--workdir", str(folder), *rest])
    if not (paths := sorted(folder.glob("*/seed*/row.json"))):
        raise ConfigError(f"workdir={str(folder)!r} holds no finished run: train some first")
    found = [read_row(path) for path in paths]
    text = "# Claims\n\n" + markdown(table(found))
    if options.robustness:
        text += "\n## Percentage of byte accuracy that remains\n\n"
        text += markdown(robustness(folder, options.robustness))
    replace_file(folder / "CLAIMS.md", text.encode())
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
    return code


if __name__ == "__main__":
    run(main)
