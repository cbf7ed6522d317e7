"""Text in several scripts at published scale.

    python -m experiments.pretrain magnet_126M --data.files 'oscar/*.array_record'

They need accelerators (`tpu.plan`). The small twins are `magnet` and `flexitokens` (`systems`) and,
with H-Net's router, `mixed_scripts_routed`, which runs on a CPU in 5 minutes.
"""

from dataclasses import replace

from experiments.configs import default, systems
from hnet.config import ComputeConfig, HNetConfig, StageConfig
from hnet.train.config import CheckpointConfig, Config, EvalConfig, OptimConfig

STEPS, WARMUP = 300_000, 9_000


def magnet_126M() -> Config:
    """MAGNET at its published size: layers 2-12-2 of 768 channels, one prior per script.

    Paper: arXiv 2407.08818
    Fidelity: chunking, priors, width, number of layers, batch and learning rate as in its code; our
    pre-norm blocks with rotary positions and SwiGLU of the same number of parameters, no dropout
    Test: tests/experiments/test_named_configs.py: number of parameters
    """
    return _large("magnet_126M", systems.magnet())


def flexitokens_126M() -> Config:
    """FlexiTokens at its published size: as magnet_126M, with one predictor and a hinge.

    Paper: arXiv 2507.12720
    Fidelity: as magnet_126M, with the rates and bands of owos/flexitokens
    Test: tests/experiments/test_named_configs.py: number of parameters
    """
    return _large("flexitokens_126M", systems.flexitokens())


def _large(name: str, model: HNetConfig) -> Config:
    outer = StageConfig(
        ("T2", "T2"),
        768,
        2048,
        num_heads=12,
        rotary_emb_dim=32,
        chunking=replace(model.stages[0].chunking, hold_rate=False),
    )
    main = StageConfig(("T12",), 768, 2048, num_heads=12, rotary_emb_dim=32)
    compute = ComputeConfig(dtype="bfloat16", remat="layer")
    base = default.config()
    return replace(
        base,
        workdir=f"runs/{name}",
        model=replace(model, stages=(outer, main), compute=compute),
        data=replace(base.data, batch_size=128, seq_len=512),
        optim=OptimConfig(
            learning_rate=5e-5, schedule="cosine", lr_multipliers="none", b2=0.999,
            warmup_frac=WARMUP / STEPS, clip_norm=0.25, weight_decay=0.0,
        ),
        train=replace(base.train, steps=STEPS),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
