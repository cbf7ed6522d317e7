"""Train a named configuration.

    python -m experiments.pretrain [NAME] [--section.field VALUE ...]
    python -m experiments.pretrain --list                    what each named configuration is
    python -m experiments.pretrain [NAME] --help [SECTION]   what can be set, e.g. --help train

NAME is a name, a .json file (ours, or an official H-Net one; with "base": NAME it holds only what
differs), or package.module:function. The same command again resumes. Parts go by name:
--model.stages.0.chunking.dechunk repeat. --init.from CHECKPOINT starts from its weights, without
NAME in its architecture. Exit codes: 0 done, 1 failed, 2 bad input, 75 asked to stop and saved
(start again).
"""

import sys

from hnet.command_line import run
from hnet.train.named import list_text, run_config


def main() -> int:
    if sys.argv[1:] == ["--list"]:
        print(list_text())
        return 0
    config = run_config()
    from hnet.train.command import pretrain  # here: bad arguments are reported before JAX is loaded

    return pretrain(config)


if __name__ == "__main__":
    run(main, trains=True)
