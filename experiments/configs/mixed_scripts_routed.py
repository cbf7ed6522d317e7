"""A small H-Net for text in several scripts, with one router and one target per script.

    python -m experiments.pretrain mixed_scripts_routed --data.files eng.txt rus.txt ...

About 5 minutes on two CPU cores. The default route has no script of its own. After training it is
fitted on text in synthetic scripts, so that a script that does not occur in training also gets its
target ratio. With these targets a sentence has the same number of chunks in English, Russian,
Chinese, Japanese and Malayalam, at 6 bytes per chunk on average; `experiments.calibrate` finds the
targets for other text.
"""

from dataclasses import replace

from experiments.configs import mixed_scripts_single
from hnet.train.config import Config

TARGET_RATIOS = {  # bytes per chunk
    (): 3.6,  # all others, as Latin
    ("Latin",): 3.6,
    ("Cyrillic",): 6.8,
    ("Han",): 3.3,
    ("Hiragana", "Katakana"): 5.9,
    ("Malayalam",): 11.5,
}


def config() -> Config:
    base = mixed_scripts_single.config()
    outer, *inner = base.model.stages
    chunking = replace(
        outer.chunking, routes=len(TARGET_RATIOS), route_target_ratios=tuple(TARGET_RATIOS.values())
    )
    groups = tuple(group for group in TARGET_RATIOS if group)
    stages = (replace(outer, chunking=chunking), *inner)
    return replace(
        base,
        workdir="runs/mixed_scripts_routed",
        rate_control=replace(base.rate_control, fit_default=True),
        model=replace(base.model, stages=stages, route_groups=groups),
    )
