"""Settings of layers: of all stages, of one stage, and of each mixer."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Literal, Self

from hnet.bounds import Bounds, Count, Natural, NotNegative, Positive


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
    """positions per block of queries and of keys in attention; default: 128, on CPUs in bfloat16
    256, on GPUs 1024, with cudnn 2048 queries (TPU kernels choose their own)"""
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
class SharedConfig:
    """What the layers of all stages share; `hnet.config.HNetConfig` has it too."""

    _: KW_ONLY
    ssm: SSMConfig = SSMConfig()
    mixers: tuple[tuple[str, str], ...] = ()
    """additional letters of layout strings and their classes, ("k", "my_paper.layers:Kernel")"""
    compute: ComputeConfig = ComputeConfig()


@dataclass(frozen=True)
class StackConfig:
    """Layers of one stage; `hnet.config.StageConfig` has them too."""

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
    _: KW_ONLY
    attention: AttentionConfig = AttentionConfig()
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()
    delta: GatedDeltaNetConfig = GatedDeltaNetConfig()
    mlstm: MLSTMConfig = MLSTMConfig()
    vectors: Count = 1
    """number of vectors side by side that a position of the innermost stage consists of, each
    d_model / vectors wide: heads and MLPs are those of one vector, and attention sees all vectors
    of a position"""

    @property
    def d_mlp(self) -> int:
        return -(-self.d_intermediate // 128) * 128

    @property
    def of_one_vector(self) -> Self:
        """This stage with the width of one of its `vectors`."""
        return replace(self, d_model=self.d_model // self.vectors) if self.vectors > 1 else self

    def heads_problem(self) -> str | None:
        """One line, "field=value: remedy", if the width is not divided by the heads."""
        if self.num_heads >= 1 and self.d_model % self.num_heads == 0:
            return None
        return (
            f"d_model={self.d_model} is not divided by num_heads={self.num_heads}: "
            "choose a number of heads that divides it"
        )
