"""Settings of the mixers and their checks, without JAX: errors are raised before JAX is imported.

A check returns "field=value: remedy" if the mixer cannot be built for the stage, else None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hnet.bounds import Bounds, Count, Natural, NotNegative, Positive

if TYPE_CHECKING:
    from hnet.config import HNetConfig, StageConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Options of self-attention beyond the official ones."""

    num_kv_heads: Natural = 0
    """number of key and value heads, each shared by equally many query heads; 0 = num_heads"""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before the rotary embedding"""
    logit_soft_cap: NotNegative = 0.0
    """soft cap c: scores become c tanh(score / c); 0 = none"""
    rotary_base: Positive = 1e4
    """base of the frequencies of rotary positions (5e5 in AU-Net)"""
    sink: Literal["none", "one", "learned"] = "none"
    """term added to the denominator of the softmax: none, 1, or exp of one learned logit per
    head"""


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Attention to vectors of chunks (layers x and X); heads and width are those of the stage."""

    relation: Literal["equal", "last_closed"] = "equal"
    """newest chunk that a position sees: the one that it reads, i.e. the last with an output of the
    main network, or the one before that"""
    window: Annotated[int, Bounds(-1)] = 1
    """number of chunks that a position sees; -1 = all up to the newest"""
    memory_width: Natural = 0
    """width of the memory vectors; 0 = d_model"""


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet mixers (layers g and G)."""

    num_heads: Natural = 0
    """number of heads; 0 = num_heads of the stage"""
    head_dim: Natural = 0
    """channels of queries and keys per head; 0 = d_model / num_heads"""
    expand_v: Count = 2
    """number of value channels per key channel"""
    d_conv: Count = 4
    """number of taps of the causal convolution"""


@dataclass(frozen=True)
class MLSTMConfig:
    """mLSTM mixers (layers l and L)."""

    num_heads: Natural = 0
    """number of heads; 0 = num_heads of the stage"""
    value_dim: Natural = 0
    """channels of values per head; 0 = d_model / num_heads"""
    key_dim: Natural = 0
    """channels of queries and keys per head; 0 = half of those of values"""
    gate_soft_cap: NotNegative = 15.0
    """soft cap c of the gates' preactivations, c tanh(x / c); 0 = none"""
    input_gate_bias: float = -10.0
    """initial bias of the input gate, whose weight is exp"""


def attention_problem(config: "HNetConfig", stage: "StageConfig") -> str | None:
    if problem := _heads_problem(stage):
        return problem
    head_dim = stage.d_model // stage.num_heads
    if stage.rotary_emb_dim % 2 or not 0 <= stage.rotary_emb_dim <= head_dim:
        return (
            f"rotary_emb_dim={stage.rotary_emb_dim}: "
            f"use an even number from 0 to the head width {head_dim}"
        )
    kv_heads = stage.attention.num_kv_heads
    if kv_heads and stage.num_heads % kv_heads:
        return (
            f"attention.num_kv_heads={kv_heads} does not divide num_heads={stage.num_heads}: "
            "use a divisor, or 0 for as many"
        )
    return None


def _heads_problem(stage: "StageConfig") -> str | None:
    if stage.num_heads >= 1 and stage.d_model % stage.num_heads == 0:
        return None
    return (
        f"d_model={stage.d_model} is not divided by num_heads={stage.num_heads}: "
        "choose a number of heads that divides it"
    )


def cross_attention_problem(config: "HNetConfig", stage: "StageConfig") -> str | None:
    if problem := _heads_problem(stage):
        return problem
    if stage.cross_attention.window == 0:
        return "cross_attention.window=0: use 1 or more, or -1 for all groups"
    return None


def mamba2_problem(config: "HNetConfig", stage: "StageConfig") -> str | None:
    if (config.ssm.expand * stage.d_model) % config.ssm.head_dim:
        return (
            f"d_model={stage.d_model} times model.ssm.expand={config.ssm.expand} is not a "
            f"multiple of model.ssm.head_dim={config.ssm.head_dim}: choose a d_model that is"
        )
    return None


def delta_problem(config: "HNetConfig", stage: "StageConfig") -> str | None:
    options = stage.delta
    heads = options.num_heads or stage.num_heads
    if heads < 1 or (options.head_dim == 0 and stage.d_model % heads):
        return (
            f"d_model={stage.d_model} is not divided by the {heads} heads of layers g: "
            "give delta.head_dim, or another delta.num_heads"
        )
    return None


def mlstm_problem(config: "HNetConfig", stage: "StageConfig") -> str | None:
    options = stage.mlstm
    heads = options.num_heads or stage.num_heads
    if heads < 1 or (options.value_dim == 0 and stage.d_model % heads):
        return (
            f"d_model={stage.d_model} is not divided by the {heads} heads of layers l: "
            "give mlstm.value_dim, or another mlstm.num_heads"
        )
    return None


Check = Callable[["HNetConfig", "StageConfig"], str | None]
PROBLEMS: dict[str, Check] = {
    "g": delta_problem,
    "l": mlstm_problem,
    "m": mamba2_problem,
    "t": attention_problem,
    "x": cross_attention_problem,
}
