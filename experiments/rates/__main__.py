"""Layouts on which others report a stuck or missed rate: fixed weight against held rate.

    python -m experiments.rates --data.files 'train/*.txt' --data.eval_files heldout.txt

Two Mamba-2 layers around six of attention with targets 8, 9 and 4.6: public runs at 8 were stuck at
a rate of .31, at 9 landed at 5 to 6 bytes per chunk, at 4.6 at 3.8. Each is trained with the rate
loss of fixed weight only, and with `hold_rate`, by `experiments.compare` at equal parameters, whose
settings these are. RESULTS.md in WORKDIR has wanted and achieved rate and bits per byte.
"""

import sys
from collections.abc import Sequence

from experiments import rates
from experiments.compare import __main__ as compare
from hnet.command_line import run

DEFAULTS = {
    "workdir": "runs/rates", "match": "parameters", "reference_parameters": "300000",
    "optim.lr_multipliers": "none",
}  # fmt: skip


NAMES = tuple(f"{rates.__name__}:{each.__name__}" for each in rates.LAYOUTS)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    own = [f for name, value in DEFAULTS.items() if f"--{name}" not in argv
           for f in (f"--{name}", value)]  # fmt: skip
    return compare.main([*NAMES, "--reference", NAMES[0], *own, *argv])


if __name__ == "__main__":
    run(main)
