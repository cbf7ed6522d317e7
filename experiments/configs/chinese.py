"""H-Net on Chinese: a small twin of the published network.

    python -m experiments.pretrain chinese_small --data.files 'zho/*.txt'

About 8 minutes on two CPU cores. At published scale: `2stage_XL_chinese`, trained on 46 billion
Llama-3 tokens of FineWeb-Edu-Chinese-V2.1. A character of Chinese is 3 bytes, so the first stage
gives about one chunk per character and the second one per three characters.
"""

from experiments.configs import english
from hnet.train.config import Config


def chinese_small() -> Config:
    """H-Net with two stages for Chinese: 2stage_XL_chinese at 1.4M parameters.

    Paper: arXiv 2507.07955
    Fidelity: layouts, ratios and multipliers of the published 2stage_XL_chinese with fewer and
    narrower layers; optimizer and schedule of the default job
    Test: tests/experiments/test_named_configs.py
    """
    return english.twin("chinese_small", main="T4")
