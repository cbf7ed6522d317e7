"""Move weights between formats and compare them.

    python -m hnet.interop convert SOURCE TARGET [--config JSON] [--dtype bfloat16] [--step N]
    python -m hnet.interop verify A B [--config JSON] [--tolerance 1e-4]

SOURCE, TARGET, A and B are work directories, or official state dicts: .pt, .safetensors, .npz with
their JSON beside them. Exit code 1 if two checkpoints differ, 2 for bad input.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from hnet.command_line import BAD_INPUT, OneLineParser, number, run
from hnet.interop.convert import convert, verify
from hnet.interop.official import Mismatch
from hnet.runtime.compile_cache import enable_compilation_cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(prog="python -m hnet.interop", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    one = commands.add_parser("convert", help="write the weights in another format")
    one.add_argument("source")
    one.add_argument("target", help="a new .pt, .safetensors, .npz or work directory")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matmul weights")
    step = number(int, 0, 2**31)
    one.add_argument("--step", type=step, help="of a work directory (default: newest)")
    one.add_argument(
        "--ema", action="store_true", help="the average of a run's parameters (optim.ema_decay)"
    )
    two = commands.add_parser("verify", help="compare the logits of two checkpoints")
    two.add_argument("first")
    two.add_argument("second")
    two.add_argument(
        "--tolerance", type=number(float, 0, 1e9), default=1e-4, help="of a logit (default 1e-4)"
    )
    for command in (one, two):
        command.add_argument("--config", help="official JSON of a file that has none beside it")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by a run
    enable_compilation_cache()
    try:
        return _convert(options) if options.command == "convert" else _verify(options)
    except Mismatch as e:
        for problem in e.first(40):
            print(f"  {problem}", file=sys.stderr)
        print(f"error: {len(e.problems)} parameters do not fit the configuration", file=sys.stderr)
        return BAD_INPUT


def _convert(options: argparse.Namespace) -> int:
    convert(
        options.source, options.target,
        config=options.config, dtype=options.dtype, step=options.step, ema=options.ema,
    )  # fmt: skip
    print(f"wrote {options.target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    found = verify(options.first, options.second, config=options.config)
    same = found.max_difference <= options.tolerance and not found.other_boundaries
    print(
        f"{'same' if same else 'DIFFERENT'}: largest difference of a logit "
        f"{found.max_difference:.2e} (logits up to {found.max_logit:.3g}), "
        f"{found.other_boundaries} other boundaries, {found.positions} bytes"
    )
    return 0 if same else 1


if __name__ == "__main__":
    run(main)
