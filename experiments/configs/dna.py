"""H-Net on DNA: the published layout, and a small twin.

    python -m experiments.pretrain dna_small --data.files genome.txt --data.eval_files other.txt
    python -m experiments.evaluate --checkpoint runs/dna_small --alphabet ACGTN

`dna_small` takes about 4 minutes on two CPU cores. Text is one byte per base, without headers and
best without line ends, for example

    grep -v '>' genome.fa | tr -d '\n' | tr a-z A-Z > genome.txt

`evaluate --alphabet` prints perplexity per base: 4 for uniform bases, 2.7 in the paper.
"""

from dataclasses import replace

from experiments.configs import default
from hnet.config import ChunkingConfig, ComputeConfig, HNetConfig, StageConfig
from hnet.train.config import CheckpointConfig, Config, EvalConfig, OptimConfig


def dna() -> Config:
    """H-Net for DNA as published for HG38: 64M parameters, 3 bases per chunk.

    Paper: arXiv 2507.07955
    Fidelity: layout m3T1, T15, m4, width 512, target 3 and rate of 5e-3 at the bases as published;
    width of the MLPs from the published number of parameters; batch shape and length are ours, for
    they are not in the paper's table
    Test: tests/experiments/test_named_configs.py: number of parameters
    """
    cut = ChunkingConfig(3.0)
    stages = (
        StageConfig(("m3T1", "m4"), 512, 1408, num_heads=8, rotary_emb_dim=32, chunking=cut),
        StageConfig(("T15",), 512, 1408, num_heads=8, rotary_emb_dim=32),
    )
    base = default.config()
    return replace(
        base,
        workdir="runs/dna",
        model=HNetConfig(stages, compute=ComputeConfig(dtype="bfloat16", remat="layer")),
        data=replace(base.data, batch_size=64, seq_len=8192, bos_eos=False),
        optim=OptimConfig(learning_rate=5e-3, lr_multipliers=(1.0, 3**-0.5)),
        train=replace(base.train, steps=20_000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )


def dna_small() -> Config:
    """H-Net for DNA at 0.7M parameters.

    Paper: arXiv 2507.07955
    Fidelity: kinds of layers, target, rate and multipliers of dna, with fewer and narrower layers
    Test: tests/experiments/test_named_configs.py
    """
    base = dna()
    cut = ChunkingConfig(3.0, hold_rate=True)
    stages = (
        StageConfig(("m1T1", "m2"), 96, 256, num_heads=4, rotary_emb_dim=12, chunking=cut),
        StageConfig(("T3",), 96, 256, num_heads=4, rotary_emb_dim=12),
    )
    small = default.config()
    return replace(
        base,
        workdir="runs/dna_small",
        model=replace(small.model, stages=stages, ssm=replace(small.model.ssm, head_dim=32)),
        data=replace(base.data, batch_size=8, seq_len=512),
        train=replace(small.train, steps=250),
        eval=replace(small.eval, every=125),
        checkpoint=small.checkpoint,
    )
