"""Move weights between formats and the Hub, and compare them.

    python -m hnet.interop convert SOURCE TARGET [--config JSON] [--dtype bfloat16] [--step N]
    python -m hnet.interop verify A B [--config JSON] [--tolerance 1e-4]
    python -m hnet.interop push SOURCE hf://owner/name[@branch] [--private] [--replace-card]
    python -m hnet.interop pull hf://owner/name[@revision] FOLDER

SOURCE, A and B are work directories, WORKDIR@STEP or WORKDIR/checkpoints/STEP, files of weights
(.pt, .safetensors, .npz) with their JSON beside them, folders with one, or
hf://owner/name[@revision].
TARGET is a new file or a new work directory. The Hub needs the extra `hub` and, to push, a token
(HF_TOKEN). Exit code 1 if two checkpoints differ, 2 for bad input.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import jax

from hnet.command_line import OneLineParser, file_path, number, one_line, run
from hnet.errors import ConfigError
from hnet.interop.convert import convert, verify
from hnet.interop.publish import pull, push
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.train.workdir import read_config
from hnet.weights.official import Mismatch
from hnet.weights.sources import resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by a run
    enable_compilation_cache()
    try:
        return options.do(options)
    except Mismatch as e:
        for problem in e.first(40):
            print(f"  {one_line(problem)}", file=sys.stderr)
        raise ConfigError(
            f"{len(e.problems)} parameters do not fit the configuration: give that of the weights"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m hnet.interop", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, do, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.set_defaults(do=do)
        return added

    convert_ = command("convert", _convert, "write the weights in another format")
    verify_ = command("verify", _verify, "compare the logits of two checkpoints")
    push_ = command("push", _push, "put weights, configuration and a model card on the Hub")
    pull_ = command("pull", _pull, "get such a folder from the Hub")
    convert_.add_argument("source", type=file_path)
    convert_.add_argument(
        "target", type=file_path, help="a new .pt, .safetensors, .npz or work directory"
    )
    verify_.add_argument("first", type=file_path)
    verify_.add_argument("second", type=file_path)
    tolerance = number(float, 0, 1e9)
    verify_.add_argument(
        "--tolerance", type=tolerance, default=1e-4, help="of a logit (default 1e-4)"
    )
    push_.add_argument("source", type=file_path)
    push_.add_argument("address", help="hf://owner/name[@branch]")
    push_.add_argument("--private", action="store_true", help="if the repository is made")
    push_.add_argument("--replace-card", action="store_true", help="also where there is one")
    pull_.add_argument("address", help="hf://owner/name[@revision]")
    pull_.add_argument("target", type=file_path, help="a new folder")
    for added in (convert_, push_):
        added.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matmul weights")
        step = number(int, 0, 2**31)
        added.add_argument("--step", type=step, help="of a work directory (default: newest)")
        added.add_argument(
            "--ema", action="store_true", help="the average of a run's parameters (optim.ema_decay)"
        )
    for added in (convert_, verify_, push_):
        added.add_argument(
            "--config", type=file_path, help="JSON of a file that has none beside it"
        )
    return parser


def _convert(options: argparse.Namespace) -> int:
    convert(
        options.source, options.target,
        config=options.config, dtype=options.dtype, step=options.step, ema=options.ema,
    )  # fmt: skip
    print(f"wrote {options.target}")
    _say_bos(options)
    return 0


def _say_bos(options: argparse.Namespace) -> None:
    """Print what the written file cannot tell: that its texts begin without BOS."""
    found = resolve(options.source, options.step)
    if found.is_run and not read_config(found.path).data.bos_eos:
        print("trained with data.bos_eos False, which the file does not say: use --bos False")


def _verify(options: argparse.Namespace) -> int:
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise ConfigError(f"tolerance={options.tolerance}: use 0 or a positive number")
    found = verify(options.first, options.second, config=options.config)
    same = found.max_difference <= options.tolerance and not found.other_boundaries
    print(
        f"{'same' if same else 'DIFFERENT'}: largest difference of a logit "
        f"{found.max_difference:.2e} (logits up to {found.max_logit:.3g}), "
        f"{found.other_boundaries} other boundaries, {found.positions} bytes"
    )
    return 0 if same else 1


def _push(options: argparse.Namespace) -> int:
    commit = push(
        options.source, options.address, config=options.config, dtype=options.dtype,
        step=options.step, ema=options.ema, private=options.private,
        replace_card=options.replace_card,
    )  # fmt: skip
    print(f"pushed {options.source}: {commit}")
    _say_bos(options)
    return 0


def _pull(options: argparse.Namespace) -> int:
    print(f"wrote {pull(options.address, options.target)}")
    return 0


if __name__ == "__main__":
    run(main)
