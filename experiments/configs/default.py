"""A small 1-stage H-Net that learns English in a few minutes on a laptop.

    python -m experiments.pretrain

Two CPU cores, about 5 minutes. It reads the documentation of the installed Python.
"""

from hnet.config import ChunkingConfig, ComputeConfig, HNetConfig, SSMConfig, StageConfig
from hnet.train.config import CheckpointConfig, Config, EvalConfig, OptimConfig, TrainConfig


def config() -> Config:
    outer = StageConfig(
        ("m2", "m2"), 128, num_heads=4, rotary_emb_dim=16, chunking=ChunkingConfig(4.0)
    )
    main = StageConfig(("T4",), 256, 512, num_heads=4, rotary_emb_dim=32)
    return Config(
        model=HNetConfig(
            (outer, main),
            ssm=SSMConfig(d_state=64, chunk_size=64),
            compute=ComputeConfig(scan_layers=False),
        ),
        workdir="runs/default",
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(steps=180, rows_sharing_slots=8),
        eval=EvalConfig(every=90, max_bytes=16_384),
        checkpoint=CheckpointConfig(every=90),
    )
