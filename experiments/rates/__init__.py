"""Layouts on which others report a stuck or missed rate: fixed weight against held rate."""

from dataclasses import replace

from experiments.configs import default
from hnet.config import ChunkingConfig, HNetConfig, StageConfig


def _layout(target: float, held: bool) -> HNetConfig:
    chunking = ChunkingConfig(target, hold_rate=held)
    outer = StageConfig(("m2", "m2"), 64, num_heads=4, rotary_emb_dim=8, chunking=chunking)
    main = StageConfig(("T6",), 96, 256, num_heads=4, rotary_emb_dim=12)
    return replace(default.config().model, stages=(outer, main))


def fixed_8() -> HNetConfig:
    """Target 8, rate loss of fixed weight."""
    return _layout(8.0, False)


def held_8() -> HNetConfig:
    """Target 8, held."""
    return _layout(8.0, True)


def fixed_9() -> HNetConfig:
    """Target 9, rate loss of fixed weight."""
    return _layout(9.0, False)


def held_9() -> HNetConfig:
    """Target 9, held."""
    return _layout(9.0, True)


def fixed_4_6() -> HNetConfig:
    """Target 4.6, rate loss of fixed weight."""
    return _layout(4.6, False)


def held_4_6() -> HNetConfig:
    """Target 4.6, held."""
    return _layout(4.6, True)


LAYOUTS = (fixed_8, held_8, fixed_9, held_9, fixed_4_6, held_4_6)
