"""H-Net on English: a small twin of the published network with two stages.

    python -m experiments.pretrain english_small --data.files 'books/*.txt'

About 8 minutes on two CPU cores. At published scale: `1stage_L` to `2stage_XL` (`published`).
`default` is the same with one stage, `reference` with the schedule of a known measurement.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import ChunkingConfig, StageConfig
from hnet.train.config import Config


def english_small() -> Config:
    """H-Net with two stages for English: 2stage_XL at 1.2M parameters.

    Paper: arXiv 2507.07955
    Fidelity: layouts, ratios and multipliers of the published 2stage_XL with fewer and narrower
    layers; optimizer and schedule of the default job
    Test: tests/experiments/test_named_configs.py
    """
    return twin("english_small", main="T3")


def twin(name: str, *, main: str) -> Config:
    """A run of a network as 2stage_XL: 64, 96 and 128 channels, targets 3 and 3."""
    base = default.config()
    cut = ChunkingConfig(3.0, hold_rate=True)
    stages = (
        StageConfig(("m2", "m2"), 64, num_heads=4, rotary_emb_dim=8, chunking=cut),
        StageConfig(("T1m1", "m1T1"), 96, 256, num_heads=4, rotary_emb_dim=12, chunking=cut),
        StageConfig((main,), 128, 384, num_heads=4, rotary_emb_dim=16),
    )
    model = replace(base.model, stages=stages, ssm=replace(base.model.ssm, head_dim=32))
    return replace(
        base,
        workdir=f"runs/{name}",
        model=model,
        train=replace(base.train, steps=300),
        eval=replace(base.eval, every=100),
    )
