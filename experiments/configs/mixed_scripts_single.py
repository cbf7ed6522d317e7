"""A small H-Net for text in several scripts, with one router for all: the twin to compare with.

    python -m experiments.pretrain mixed_scripts_single --data.files eng.txt rus.txt ...

It differs from mixed_scripts_routed in nothing but the routes: same data, steps and mean rate of 6
bytes a chunk. Two CPU cores, about 10 minutes. `experiments.fairness_table` trains both.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.chunking.controller import ControllerConfig
from hnet.config import ChunkingConfig
from hnet.train.config import Config


def config() -> Config:
    base = default.config()
    outer = replace(base.model.stages[0], chunking=ChunkingConfig(6.0))
    return replace(
        base,
        workdir="runs/mixed_scripts_single",
        model=replace(base.model, stages=(outer, *base.model.stages[1:])),
        data=replace(base.data, batch_size=16),
        controller=ControllerConfig(enabled=True),
        train=replace(base.train, steps=600),
        eval=replace(base.eval, every=200),
        checkpoint=replace(base.checkpoint, every=200),
    )
