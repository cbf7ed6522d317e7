"""H-Net on program code: a small twin of the published network.

    python -m experiments.pretrain code_small --data.files 'src/**/*.py'

About 8 minutes on two CPU cores. At published scale: `2stage_XL_code`, trained on the GitHub part
of The Pile. Rows are twice as long as for text, since names come back from further away.
"""

from dataclasses import replace

from experiments.configs import english
from hnet.train.config import Config


def code_small() -> Config:
    """H-Net with two stages for code: 2stage_XL_code at 1.2M parameters.

    Paper: arXiv 2507.07955
    Fidelity: layouts, ratios and multipliers of the published 2stage_XL_code with fewer and
    narrower layers; optimizer and schedule of the default job, rows of 1024 bytes
    Test: tests/experiments/test_named_configs.py
    """
    base = english.twin("code_small", main="T3")
    return replace(base, data=replace(base.data, batch_size=4, seq_len=1024))
