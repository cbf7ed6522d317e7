"""Read every checkpoint of a run back, one line each.

    python -m hnet.checkpoint verify WORKDIR

Exit code 1 if none is good, 2 for bad input.
"""

from collections.abc import Sequence

import jax

from hnet.checkpoint.verify import verify_workdir
from hnet.command_line import OneLineParser, file_path, run
from hnet.runtime.compile_cache import enable_compilation_cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(prog="python -m hnet.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="read every checkpoint back, one line each")
    verify.add_argument(
        "workdir", type=file_path, metavar="WORKDIR", help="local folder or gs://bucket/folder"
    )
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # the run itself may occupy the accelerator
    enable_compilation_cache()
    return verify_workdir(options.workdir)


if __name__ == "__main__":
    run(main)
