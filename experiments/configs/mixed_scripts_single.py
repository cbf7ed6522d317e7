"""A small H-Net for text in several scripts, with one router for all: the baseline without routes.

    python -m experiments.pretrain mixed_scripts_single --data.files eng.txt rus.txt ...

It differs from mixed_scripts_routed only in the routes: same data, same steps and the same mean of
6 bytes per chunk, held by the controller. About 5 minutes on two CPU cores.
`experiments.scripts` trains both.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import ChunkingConfig, StageConfig
from hnet.train.config import Config


def config() -> Config:
    base = default.config()
    outer = StageConfig(
        ("m1", "m1"), 64, num_heads=4, rotary_emb_dim=16,
        chunking=ChunkingConfig(6.0, hold_rate=True),
    )  # fmt: skip
    main = StageConfig(("T2",), 128, 256, num_heads=4, rotary_emb_dim=16)
    return replace(
        base,
        workdir="runs/mixed_scripts_single",
        model=replace(base.model, stages=(outer, main)),
        data=replace(base.data, batch_size=16, seq_len=256),
        train=replace(base.train, steps=400),
        eval=replace(base.eval, every=200),
        checkpoint=replace(base.checkpoint, every=100),
    )
