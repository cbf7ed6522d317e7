"""Claims of papers, measured: what holds at a small size."""

from dataclasses import replace

from experiments.configs.systems import hnet, with_chunking
from hnet.config import ChunkingConfig, HNetConfig


def two_stages() -> HNetConfig:
    """H-Net with two stages, 3 and 2 positions per chunk: 6 bytes per inner chunk, as hnet."""
    base = hnet()
    outer, main = base.stages
    outer = replace(outer, chunking=replace(outer.chunking, target_ratio=3.0))
    middle = replace(
        main, arch_layout=("T1", "T1"), d_model=192, d_intermediate=384, rotary_emb_dim=24,
        chunking=ChunkingConfig(2.0),
    )  # fmt: skip
    return replace(base, stages=(outer, middle, replace(main, arch_layout=("T3",))))


def no_smoothing() -> HNetConfig:
    """H-Net without the EMA over chunks, and so without the gradient of confidence."""
    return with_chunking(hnet(), dechunk="repeat")


def transformer_ends() -> HNetConfig:
    """H-Net with attention instead of Mamba-2 around the main network."""
    base = hnet()
    outer, *inner = base.stages
    outer = replace(outer, arch_layout=("t3", "t3"))
    return replace(base, stages=(outer, *inner))
