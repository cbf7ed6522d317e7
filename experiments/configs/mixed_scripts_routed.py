"""A small H-Net for text in several scripts, with a router and a target for each of them.

    python -m experiments.pretrain mixed_scripts_routed --data.files eng.txt rus.txt ...

Two CPU cores, about 5 minutes. The default route has no script of its own: in the end it is fitted
on text in made-up scripts, so that a script which was never trained on is cut like others. The
targets give a sentence the same number of chunks in English, Russian, Chinese, Japanese and
Malayalam at 6 bytes a chunk on average; `experiments.calibrate` finds those of other text.
"""

from dataclasses import replace

from experiments.configs import mixed_scripts_single
from hnet.train.config import Config

TARGET_RATIOS = {  # bytes a chunk
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
        controller=replace(base.controller, fit_default=True),
        model=replace(base.model, stages=stages, route_groups=groups),
    )
