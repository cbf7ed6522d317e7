"""The command `python -m experiments.compare`; `settings.py` says what it does."""

import sys
from collections.abc import Sequence

from experiments.compare.settings import Compare
from hnet.command_line import parse, run


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, settings = argv[:count], parse(Compare, Compare(), argv[count:])
    from experiments.compare.worker import Comparison  # here: bad words are reported first

    return Comparison(names, settings).run()


if __name__ == "__main__":
    run(main, trains=True)
