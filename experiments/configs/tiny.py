"""The smallest useful 1-stage H-Net, for trying out commands and sweeps.

    python -m experiments.pretrain tiny

Synthetic text; on one CPU core a few seconds after compilation.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import ChunkingConfig, ComputeConfig, HNetConfig, SSMConfig, StageConfig
from hnet.data import DataConfig
from hnet.train.config import Config


def config() -> Config:
    base = default.config()
    outer = StageConfig(("m1", "m1"), 32, num_heads=2, rotary_emb_dim=8, chunking=ChunkingConfig(4))
    main = StageConfig(("T2",), 48, 128, num_heads=2, rotary_emb_dim=12)
    return replace(
        base,
        model=HNetConfig(
            (outer, main),
            ssm=SSMConfig(d_state=16, head_dim=16),
            compute=ComputeConfig(ssd_block_len=32),
        ),
        workdir="runs/tiny",
        data=DataConfig(("synthetic:latin",), batch_size=8, seq_len=128, eval_max_bytes=4096),
        train=replace(base.train, steps=24),
        eval=replace(base.eval, every=0, probe_bytes=64),
        checkpoint=replace(base.checkpoint, every=0),
    )
