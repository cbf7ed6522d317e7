"""Typed, frozen configuration of the network, and the six published ones.

All classes of a network's configuration can be imported from here.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

from hnet import official_config
from hnet.architecture import Architecture, StageConfig
from hnet.chunking.config import ChunkingConfig
from hnet.config_check import check_network
from hnet.errors import ConfigError
from hnet.fields import from_json
from hnet.files import read_object
from hnet.nn.settings import (
    AttentionConfig,
    ComputeConfig,
    CrossAttentionConfig,
    GatedDeltaNetConfig,
    MLSTMConfig,
    SSMConfig,
)

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "PUBLISHED",
    "AttentionConfig",
    "ChunkingConfig",
    "ComputeConfig",
    "CrossAttentionConfig",
    "GatedDeltaNetConfig",
    "HNetConfig",
    "MLSTMConfig",
    "SSMConfig",
    "StageConfig",
    "lr_multipliers",
]

BOS_ID = 254  # byte values that valid UTF-8 never contains, as in the official tokenizer
EOS_ID = 255


@dataclass(frozen=True)
class HNetConfig(Architecture):
    """The language model over bytes."""

    def __post_init__(self):
        """Raises ConfigError for what cannot be built."""
        super().__post_init__()
        check_network(self)

    @classmethod
    def from_json(cls, source: str | os.PathLike | dict[str, Any]) -> "HNetConfig":
        """Read the official JSON from a path or from its parsed content.

        Raises ConfigError for a missing file, invalid JSON, an unknown key or a missing key.
        """
        content = source if isinstance(source, dict) else read_object(source, "configuration file")
        return from_json(cls, official_config.read(content), "model")

    def to_json(self) -> dict[str, Any]:
        """The official JSON content of this architecture.

        Raises ConfigError if the official model does not support a stage or a mixer.
        """
        return official_config.written(self)

    @classmethod
    def named(cls, name: str) -> "HNetConfig":
        """One of the six published configurations, e.g. ``"1stage_L"``."""
        if name not in PUBLISHED:
            raise ConfigError(
                f"model name {name!r} is unknown: use one of {', '.join(PUBLISHED)}; "
                "hnet.train.named.base_config knows the other names"
            )
        return PUBLISHED[name]


def lr_multipliers(config: HNetConfig, *, bytes_per_token: float = 4.6) -> tuple[float, ...]:
    """Learning-rate multiplier of each stage, outermost first.

    lambda_s = sqrt(N_gpt * prod_{i>=s} N_i / prod_i N_i * D_S / D_s), with N_S = 1 and N_gpt =
    `bytes_per_token`, the mean bytes per GPT-2 token (arXiv 2507.07955, appendix C, eq. 11).
    """
    ratios = [s.chunking.target_ratio for s in config.stages[:-1]]
    widest = config.stages[-1].d_model
    return tuple(
        math.sqrt(bytes_per_token / math.prod(ratios[:s]) * widest / stage.d_model)
        for s, stage in enumerate(config.stages)
    )


def _published() -> dict[str, HNetConfig]:
    """The released architectures (goombalab/hnet, configs/), derived from each other."""
    ratio6, ratio3 = ChunkingConfig(6.0), ChunkingConfig(3.0)
    outer = StageConfig(("m4", "m4"), 1024, 0, 16, 32, 1023, ratio6)
    one_l = HNetConfig((outer, StageConfig(("T22",), 1536, 4096, 16, 48)))
    core_xl = StageConfig(("T24",), 2048, 5504, 16, 64)
    one_xl = HNetConfig((outer, core_xl))
    outer2 = replace(outer, chunking=ratio3)
    middle = StageConfig(("T1m4", "m4T1"), 1024, 2816, 16, 32, 1023, ratio3)
    two_l = HNetConfig((outer2, middle, StageConfig(("T26",), 1536, 4096, 16, 48)))
    middle_xl = replace(middle, d_model=1536, d_intermediate=4096, rotary_emb_dim=48)

    def two_xl(core: str) -> HNetConfig:
        return HNetConfig((outer2, middle_xl, replace(core_xl, arch_layout=(core,))))

    return {
        "1stage_L": one_l,
        "1stage_XL": one_xl,
        "2stage_L": two_l,
        "2stage_XL": two_xl("T27"),
        "2stage_XL_chinese": two_xl("T30"),
        "2stage_XL_code": two_xl("T28"),
    }


PUBLISHED: dict[str, HNetConfig] = _published()
