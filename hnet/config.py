"""Typed, frozen configuration of the network, and the six published ones.

A network is a tuple of stages, outermost first. Every stage but the last has an encoder, a boundary
predictor that splits its sequence into chunks, and a decoder; the last stage is a plain stack.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from hnet import official_config
from hnet.bounds import Bounds, Count, Natural
from hnet.chunking.config import ChunkingConfig
from hnet.config_check import check_network
from hnet.errors import ConfigError
from hnet.fields import from_json
from hnet.files import read_object
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.part import EmbeddingConfig
from hnet.nn.mixers.settings import (
    AttentionConfig,
    CrossAttentionConfig,
    GatedDeltaNetConfig,
    MLSTMConfig,
)
from hnet.parts import settings_of

BOS_ID = 254  # byte values that valid UTF-8 never contains, as in the official tokenizer
EOS_ID = 255


@dataclass(frozen=True)
class SSMConfig:
    """Mamba-2 mixers, shared by all stages (the official ``ssm_cfg``)."""

    d_state: Count = 128
    """size of the recurrent state per channel"""
    d_conv: Count = 4
    """number of taps of the causal convolution"""
    expand: Count = 2
    """ratio of the inner width to d_model"""
    head_dim: Count = 64
    """number of channels per head, which share one decay"""
    chunk_size: Count = 256
    """block length of the official kernel, kept for the JSON; ours is compute.ssd_block_len"""


@dataclass(frozen=True)
class StageConfig:
    """One stage. Stage 0 is the outermost: its positions are bytes."""

    arch_layout: tuple[str, ...]
    """(encoder, decoder) layout strings, or (stack,) in the innermost stage, where it may also be
    "package.module:Class", a subclass of `hnet.nn.stack.Stack`"""
    d_model: Count
    """width of this stage; at least that of the stage around it"""
    d_intermediate: Natural = 0
    """inner width of the SwiGLU MLPs, rounded up to a multiple of 128"""
    num_heads: Natural = 16
    """number of attention heads"""
    rotary_emb_dim: Natural = 32
    """number of channels per head with rotary positions (the others have no positions)"""
    window_size: Annotated[int, Bounds(-1)] = -1
    """number of previous positions that attention sees; -1 = all"""
    chunking: ChunkingConfig = ChunkingConfig()
    attention: AttentionConfig = AttentionConfig()
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()
    delta: GatedDeltaNetConfig = GatedDeltaNetConfig()
    mlstm: MLSTMConfig = MLSTMConfig()
    passes: Count = 1
    """number of times that chunk vectors pass a main network and positions a decoder that reads
    them. Each further pass has parameters of its own: the vectors read the states of their chunk,
    pass a main network like the first, and are read by the next decoder"""
    vectors: Count = 1
    """number of vectors side by side that a position of the innermost stage consists of, each
    d_model / vectors wide: heads and MLPs are those of one vector, and attention sees all vectors
    of a position"""

    @property
    def d_mlp(self) -> int:
        return -(-self.d_intermediate // 128) * 128

    @property
    def of_one_vector(self) -> "StageConfig":
        """This stage with the width of one of its `vectors`."""
        return replace(self, d_model=self.d_model // self.vectors) if self.vectors > 1 else self


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed: the function is the same up to rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """matmul dtype; boundary predictors, EMA, residual stream, norms and softmax use float32. On
    CPUs bfloat16 means matmul_inputs=bfloat16: other arrays stay float32"""
    matmul_inputs: Literal["auto", "bfloat16"] = "auto"
    """dtype to which the inputs of matmuls are rounded, with sums and results in float32; auto: the
    inputs have `dtype`"""
    remat: Literal["none", "layer", "dots"] = "none"
    """rematerialisation in the backward pass: none, whole layers, or all but matmul outputs"""
    scan_layers: bool = True
    """scan over equal consecutive layers, with one compiled body; False unrolls them"""
    ssd_block_len: Count | None = None
    """positions per block of the SSD; default: 64, on GPUs 128 (TPU kernels choose their own)"""
    delta_block_len: Count = 64
    """positions per block of gated DeltaNet and mLSTM"""
    attention_block_len: Count | None = None
    """positions per block of queries and of keys in attention; default: 128, on GPUs 1024, with
    cudnn 2048 queries (TPU kernels choose their own)"""
    attention_backend: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """implementation of attention: our blocks (xla), JAX's kernel for TPUs (splash) or NVIDIA's for
    bfloat16 (cudnn, not yet run); auto: splash on TPUs, cudnn on GPUs for bfloat16, else xla"""
    ssd_backend: Literal["auto", "xla", "pallas", "matmul", "triton"] = "auto"
    """implementation of the SSD: matmuls over blocks and a loop over their states (xla), a kernel
    for TPUs (pallas), fewer and larger matmuls for GPUs (matmul), or kernels for GPUs and bfloat16
    (triton), also of the convolution, gate and norm around it; the last two were not yet run on a
    GPU; auto: pallas on TPUs, matmul on GPUs, else xla"""
    tuned: str = ""
    """file written by `experiments.benchmarks.kernels` on these devices: auto and block lengths
    that are not set use what was fastest there"""

    @property
    def inputs(self) -> str | None:
        """`matmul_inputs`, or None: as `dtype`."""
        return None if self.matmul_inputs == "auto" else self.matmul_inputs


@dataclass(frozen=True)
class HNetConfig:
    """The language model over bytes."""

    stages: tuple[StageConfig, ...]
    vocab_size: int = 256
    """number of embeddings, one per byte value; at least 256"""
    ssm: SSMConfig = SSMConfig()
    tie_embeddings: bool = False
    """weight tying: the output head uses the embedding matrix"""
    embedding: EmbeddingConfig = Bytes.Config()
    """embedding: computes the vector of each byte from the bytes of its document up to it"""
    route_groups: tuple[tuple[str, ...], ...] = ()
    """names of Unicode scripts that share a route: group i is route i + 1, all others route 0"""
    mixers: tuple[tuple[str, str], ...] = ()
    """additional letters of layout strings and their classes, ("k", "my_paper.layers:Kernel")"""
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        object.__setattr__(self, "embedding", settings_of(self.embedding, EMBEDDINGS))
        check_network(self)

    @property
    def num_chunked(self) -> int:
        """Number of stages that chunk, which is the number of boundary predictors."""
        return len(self.stages) - 1

    @property
    def num_routes(self) -> int:
        """Maximum number of routes of a stage; the model needs route ids if it is more than 1."""
        return max((s.chunking.routes for s in self.stages[:-1]), default=1)

    @property
    def route_names(self) -> tuple[str, ...]:
        """Name of each route: "default" for route 0, else the scripts of its group
        ("Han+Hiragana")."""
        groups = self.route_groups or [(str(r),) for r in range(1, self.num_routes)]
        return ("default", *("+".join(group) for group in groups))

    def numbers(self) -> tuple[dict[str, Any], ...]:
        """Numbers that a compiled program takes as inputs, float32, for each stage that chunks:
        `target_ratio_R`, and the traced numbers of each part."""
        found = []
        for chunking in (stage.chunking for stage in self.stages[:-1]):
            parts = {
                name: {field: np.float32(value) for field, value in settings.numbers().items()}
                for name, settings in chunking.parts.items()
            }
            losses = tuple(parts.pop(f"losses.{i}") for i in range(len(chunking.losses)))
            targets = np.asarray(chunking.target_ratios, np.float32)
            found.append({**parts, "losses": losses, "target_ratio_R": targets})
        return tuple(found)

    def read_files(self) -> None:
        """Read the files that initial parameters come from. Raises ConfigError."""
        chunkings = [stage.chunking for stage in self.stages[:-1]]
        parts = [part for chunking in chunkings for part in chunking.parts.values()]
        for part in (self.embedding, *parts):
            part.read_files()

    @property
    def arch_layout(self) -> list:
        """The nested official form, e.g. ``["m4", ["T22"], "m4"]``."""
        nested: list = list(self.stages[-1].arch_layout)
        for stage in reversed(self.stages[:-1]):
            nested = [stage.arch_layout[0], nested, stage.arch_layout[1]]
        return nested

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
