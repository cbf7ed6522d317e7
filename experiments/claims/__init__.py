"""Claims of papers, measured: what holds at a small size."""

from dataclasses import dataclass, replace

from experiments.configs.systems import hnet, with_chunking
from hnet.chunking.dechunks.ema import EMA, confidence
from hnet.chunking.dechunks.repeat import Repeat, repeated
from hnet.chunking.part import DechunkConfig
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


class Unsmoothed(Repeat):
    """H-Net's dechunk without its moving average: position t reads y_{slot(t)} * STE(c_t)."""

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """The last chunk's vector, repeated, with the gradient of confidence."""

    def __call__(self, y_BMD, boundaries, slots, config):
        c_BL = confidence(boundaries.selected_prob_BL)
        return repeated(y_BMD, boundaries, slots) * c_BL[..., None]


class Unconfident(EMA):
    """H-Net's dechunk without the factor STE(c_t), which is 1: only its gradient is missing."""

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """Smoothing by confidence, then repeat, without the gradient of confidence."""

    def __call__(self, y_BMD, boundaries, slots, config):
        return repeated(self.smoothed(y_BMD, slots), boundaries, slots)


def no_smoothing() -> HNetConfig:
    """H-Net without the moving average over chunks; confidence keeps its gradient."""
    return with_chunking(hnet(), dechunk=f"{__name__}:Unsmoothed")


def no_straight_through() -> HNetConfig:
    """H-Net without the straight-through factor of confidence; chunks are smoothed."""
    return with_chunking(hnet(), dechunk=f"{__name__}:Unconfident")


def transformer_ends() -> HNetConfig:
    """H-Net with attention instead of Mamba-2 around the main network."""
    base = hnet()
    outer, *inner = base.stages
    outer = replace(outer, arch_layout=("t3", "t3"))
    return replace(base, stages=(outer, *inner))
