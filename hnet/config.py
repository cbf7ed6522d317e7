"""Typed, frozen configuration of the network; reads and writes the official JSON format.

A network is a tuple of stages, outermost first. Every stage but the last has an encoder, a boundary
predictor that splits its sequence into chunks, and a decoder; the last stage is a plain stack.
Layout strings are the official ones (goombalab/hnet): a run is a letter and a count, ``m`` =
Mamba-2, ``t`` = causal attention, upper case = the same followed by a SwiGLU MLP. The table
`hnet.nn.mixers.MIXERS` has more letters.
"""

import math
import os
import re
import reprlib
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import numpy as np

from hnet.bounds import Bounds, Count, Natural
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.part import Place
from hnet.errors import ConfigError
from hnet.fields import check
from hnet.files import parse_json, read_bytes
from hnet.nn.embeddings import EMBEDDINGS
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.embeddings.part import EmbeddingConfig
from hnet.nn.mixers import OFFICIAL, check_further, ignores_key_bias, reads_memory
from hnet.nn.mixers import problem as mixer_problem
from hnet.nn.mixers.settings import (
    AttentionConfig,
    CrossAttentionConfig,
    GatedDeltaNetConfig,
    MLSTMConfig,
)
from hnet.nn.stack import find_stack
from hnet.parts import settings_of

BOS_ID = 254  # byte values that valid UTF-8 never contains, as in the official tokenizer
EOS_ID = 255

_RUN = re.compile(r"([a-zA-Z])([1-9][0-9]{0,3})")


def parse_layout(layout: str) -> tuple[tuple[str, int], ...]:
    """``"T1m4"`` -> ``(("T", 1), ("m", 4))``; equal neighbours are merged into one run.

    The empty layout is a stack without layers.
    """
    if not re.fullmatch(rf"({_RUN.pattern})*", layout):
        raise ConfigError(
            f"layout {reprlib.repr(layout)} is not a sequence of runs such as 'm4' or 'T1m4': "
            "use letters of mixers, each followed by a count from 1 to 9999"
        )
    runs: list[tuple[str, int]] = []
    for kind, count in _RUN.findall(layout):
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + int(count))
        else:
            runs.append((kind, int(count)))
    return tuple(runs)


def is_class(layout: str) -> bool:
    """Whether a layout names a class of the user, "package.module:Class", instead of layers."""
    return ":" in layout


def layout_runs(layout: str) -> tuple[tuple[str, int], ...]:
    """`parse_layout`, without any run for a class of the user."""
    return () if is_class(layout) else parse_layout(layout)


def layout_height(layout: str) -> int:
    """Number of residual additions of a stack: 1 per lower-case layer, 2 per upper-case layer."""
    return sum(n * (1 + kind.isupper()) for kind, n in layout_runs(layout))


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

    @property
    def d_mlp(self) -> int:
        return -(-self.d_intermediate // 128) * 128


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
        _check(self)

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
        return _from_official(source if isinstance(source, dict) else _read_json(source))

    def to_json(self) -> dict[str, Any]:
        """The official JSON content of this architecture.

        Raises ConfigError if the official model does not support a stage or a mixer.
        """
        for i, stage in enumerate(self.stages[:-1]):
            for name, (own, official) in stage.chunking.unofficial_fields.items():
                raise ConfigError(
                    f"model.stages.{i}.chunking.{name}={own!r} has no official form, which is "
                    f"{official!r}: keep this model in its work directory"
                )
        if problem := self.unofficial_layers():
            raise ConfigError(f"{problem}: keep this model in its work directory")
        if self.ssm.head_dim != SSMConfig.head_dim:
            raise ConfigError(
                f"model.ssm.head_dim={self.ssm.head_dim} has no official form, which is "
                f"{SSMConfig.head_dim}: keep this model in its work directory"
            )
        return {
            "arch_layout": self.arch_layout,
            "d_model": [s.d_model for s in self.stages],
            "d_intermediate": [s.d_intermediate for s in self.stages],
            "vocab_size": self.vocab_size,
            "ssm_cfg": {
                "chunk_size": self.ssm.chunk_size,
                "d_conv": self.ssm.d_conv,
                "d_state": self.ssm.d_state,
                "expand": self.ssm.expand,
            },
            "attn_cfg": {
                "num_heads": [s.num_heads for s in self.stages],
                "rotary_emb_dim": [s.rotary_emb_dim for s in self.stages],
                "window_size": [s.window_size for s in self.stages],
            },
            "tie_embeddings": self.tie_embeddings,
        }

    def unofficial_layers(self) -> str | None:
        """One line on the first layer or option that the official H-Net does not have, or None."""
        if (own := self.embedding.name) != (official := Bytes.Config().name):
            return f"model.embedding={own!r} has no official form, which is {official!r}"
        for i, stage in enumerate(self.stages):
            if is_class(stage.arch_layout[0]):
                return (
                    f"model.stages.{i}.arch_layout={stage.arch_layout!r} is a class, and the "
                    "official H-Net has only layers"
                )
            kinds = {kind for part in stage.arch_layout for kind, _ in parse_layout(part)}
            if "" in stage.arch_layout:
                return f"model.stages.{i}.arch_layout={stage.arch_layout!r} has an empty stack"
            if other := sorted(kind for kind in kinds if kind.lower() not in OFFICIAL):
                letters = ", ".join(OFFICIAL)
                return (
                    f"model.stages.{i}.arch_layout={stage.arch_layout!r} has layers {other[0]!r}, "
                    f"and the official H-Net only {letters}"
                )
            plain = AttentionConfig()
            for field in fields(plain) if kinds & {"t", "T"} else ():
                if (value := getattr(stage.attention, field.name)) != getattr(plain, field.name):
                    return f"model.stages.{i}.attention.{field.name}={value!r} has no official form"
        return None

    @classmethod
    def named(cls, name: str) -> "HNetConfig":
        """One of the six published configurations, e.g. ``"1stage_L"``."""
        if name not in PUBLISHED:
            raise ConfigError(f"model name {name!r} is unknown: use one of {', '.join(PUBLISHED)}")
        return PUBLISHED[name]


def _check(config: HNetConfig) -> None:
    if not config.stages:
        raise ConfigError("model.stages is empty: give at least one stage")
    check(config, "model")
    if config.vocab_size < 256:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} cannot hold every byte: use 256 or more"
        )
    check_further(config.mixers)
    if problem := config.embedding.problem():
        raise ConfigError(f"model.embedding.{problem}")
    if problem := config.embedding.problem_in(config):
        raise ConfigError(f"model.{problem}")
    for i, stage in enumerate(config.stages):
        _check_stage(config, i, stage)
    _check_size(config)


def _check_stage(config: HNetConfig, i: int, stage: StageConfig) -> None:
    where = f"model.stages.{i}"
    inner = i == len(config.stages) - 1
    if len(stage.arch_layout) != (1 if inner else 2):
        raise ConfigError(
            f"{where}.arch_layout={reprlib.repr(stage.arch_layout)} has {len(stage.arch_layout)} "
            "parts: "
            + ("the innermost stage has one stack" if inner else "give an encoder and a decoder")
        )
    try:
        runs = layout_runs if inner else parse_layout
        kinds = {k for part in stage.arch_layout for k, _ in runs(part)}
        if inner and is_class(stage.arch_layout[0]):
            if problem := find_stack(stage.arch_layout[0]).problem(config, stage):
                raise ConfigError(f"{where}.{problem}")
            return
    except ConfigError as e:
        raise ConfigError(f"{where}.arch_layout: {e}") from None
    if inner and not stage.arch_layout[0]:
        raise ConfigError(
            f"{where}.arch_layout=('',): the innermost stage needs layers, such as 'T4'"
        )
    for letter in sorted(kinds):
        try:
            problem = mixer_problem(config, stage, letter)
        except ConfigError as e:
            raise ConfigError(
                f"{where}.arch_layout={reprlib.repr(stage.arch_layout)}: {e}"
            ) from None
        if problem:
            raise ConfigError(f"{where}.{problem}")
    if any(letter.isupper() for letter in kinds) and stage.d_intermediate < 1:
        raise ConfigError(
            f"{where}.d_intermediate={stage.d_intermediate}, but {stage.arch_layout} has MLP "
            "layers (upper case): give their width, e.g. 4 * d_model"
        )
    if problem := _memory_problem(config, i):
        raise ConfigError(f"{where}.{problem}")
    if not inner and stage.chunking.at_characters and config.vocab_size != 256:
        raise ConfigError(
            f"{where}.chunking.at_characters=True with vocab_size={config.vocab_size}: characters "
            "are told from bytes, use a vocabulary of 256, or False"
        )
    groups = len(config.route_groups)
    if inner:
        return
    problem = stage.chunking.problem(stage_idx=i, route_groups=groups)
    problem = problem or _deletion_problem(config, i)
    if problem := problem or _levels_problem(config, i, stage.chunking.predictor):
        raise ConfigError(f"{where}.chunking.{problem}")
    for at, part in stage.chunking.parts.items():
        if problem := part.problem_at_width(stage.d_model):
            raise ConfigError(f"{where}.chunking.{at}.{problem}")
    if problem := _width_problem(config, i):
        raise ConfigError(f"model.stages.{problem}")


def _memory_problem(config: HNetConfig, i: int) -> str | None:
    """One line on layers without the chunk vectors that they read, or vectors without a reader."""
    stage = config.stages[i]
    stack, *decoder = stage.arch_layout
    if letter := reads_memory(stack, config.mixers):
        return (
            f"arch_layout={stage.arch_layout!r} has layers {letter!r} outside of a decoder, and "
            "only a decoder has chunk vectors to read: use them there"
        )
    if not decoder:
        return None
    chunking = stage.chunking
    dechunk: Any = chunking.dechunk
    if not reads_memory(decoder[0], config.mixers):
        if not dechunk.part.needs_memory:
            return None
        return (
            f"chunking.dechunk={dechunk.name!r}, but the decoder {decoder[0]!r} has no layers that "
            "read chunk vectors: use layers x or X in it, such as 'x1T1'"
        )
    if dechunk.part.stands_in_decoder:
        return (
            f"chunking.dechunk={dechunk.name!r}, whose chunks are positions of the decoder, but "
            f"the decoder {decoder[0]!r} has layers that read chunk vectors: use layers t, T or m"
        )
    place = Place(i, stage.d_model, config.stages[i + 1].d_model, chunking)
    width = stage.cross_attention.memory_width or stage.d_model
    total = dechunk.part.memory_width(dechunk, place)
    if total % width:
        return (
            f"cross_attention.memory_width={stage.cross_attention.memory_width} does not divide "
            f"the {total} channels per chunk that the dechunk gives: use a divisor, or 0 for "
            "d_model"
        )
    return None


def _deletion_problem(config: HNetConfig, i: int) -> str | None:
    """One line on inner layers for which positions that are deleted softly would still be there."""
    predictor: Any = config.stages[i].chunking.predictor
    if not predictor.part.biases_keys(predictor):
        return None
    has_soft = hasattr(predictor, "soft")
    said = "predictor.soft=True" if has_soft else f"predictor={predictor.name!r} biases keys"
    for inner, stage in enumerate(config.stages[i + 1 :], i + 1):
        for layout in filter(lambda layout: not is_class(layout), stage.arch_layout):
            if letter := ignores_key_bias(layout, config.mixers):
                return (
                    f"{said}, but layers {letter!r} of stage {inner} ignore biases of keys, so "
                    "that deleted positions would still be read: use layers t or T there"
                    f"{', or predictor.soft=False' * has_soft}"
                )
    return None


def _levels_problem(config: HNetConfig, i: int, predictor: Any) -> str | None:
    outermost: Any = config.stages[0].chunking.predictor
    if not predictor.part.reads_levels:
        return None
    if not outermost.part.gives_levels:
        return (
            f"predictor={predictor.name!r} needs levels, which predictor={outermost.name!r} of "
            "stage 0 does not give: use predictor='words' there"
        )
    if outermost.num_levels <= i:
        return (
            f"predictor={predictor.name!r} in stage {i}, but predictor={outermost.name!r} of "
            f"stage 0 gives {outermost.num_levels} levels: give it {i + 1} or more"
        )
    return None


def _width_problem(config: HNetConfig, i: int) -> str | None:
    """One line on chunk vectors that do not fit into the next stage."""
    stage, inner = config.stages[i], config.stages[i + 1]
    chunking = stage.chunking
    place = Place(i, stage.d_model, inner.d_model, chunking)
    pool: Any = chunking.pool
    dechunk: Any = chunking.dechunk
    for part, width in (
        (f"pool={pool.name!r} gives", pool.part.d_out(pool, place)),
        (f"dechunk={dechunk.name!r} reads", dechunk.part.d_in(dechunk, place)),
    ):
        if width > inner.d_model:
            return (
                f"{i + 1}.d_model={inner.d_model}, but chunking.{part} {width} channels per "
                f"chunk: use {width} or more"
            )
    return None


_MOST_STAGES, _MOST_RUNS, _MOST_LAYERS, _MOST_PARAMETERS = 16, 128, 4096, 1 << 42


def _check_size(config: HNetConfig) -> None:
    """Raise ConfigError for a network so large that building it takes minutes or overflows."""
    runs = [run for s in config.stages for part in s.arch_layout for run in layout_runs(part)]
    layers, parameters = sum(count for _, count in runs), approximate_parameters(config)
    for what, count, most in (
        ("stages", len(config.stages), _MOST_STAGES),
        ("runs of equal layers", len(runs), _MOST_RUNS),
        ("layers", layers, _MOST_LAYERS),
        ("parameters", parameters, _MOST_PARAMETERS),
    ):
        if count > most:
            raise ConfigError(
                f"model.stages describe {min(count, 10**99):.3g} {what} (d_model "
                f"{reprlib.repr([stage.d_model for stage in config.stages])}, vocab_size "
                f"{reprlib.repr(config.vocab_size)}): use at most {most:.3g}"
            )


def approximate_parameters(config: HNetConfig) -> int:
    """Approximate number of parameters: all large matrices, without biases, norms and parts."""
    width = config.stages[0].d_model
    total = config.vocab_size * width + config.embedding.num_parameters(config.vocab_size, width)
    for stage in config.stages:
        D, inner = stage.d_model, config.ssm.expand * stage.d_model
        mixed, heads = inner + 2 * config.ssm.d_state, inner // config.ssm.head_dim
        ssm = D * (2 * inner + mixed + heads) + config.ssm.d_conv * mixed
        for kind, count in (run for part in stage.arch_layout for run in layout_runs(part)):
            mixer = ssm if kind in "mM" else 4 * D * D
            total += count * (mixer + 3 * D * stage.d_mlp * kind.isupper())
        total += 3 * D * D * (len(stage.arch_layout) == 2)
    return total


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        content = parse_json(read_bytes(path))
    except OSError as e:
        raise ConfigError(f"configuration file {os.fspath(path)!r}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"configuration file {os.fspath(path)!r} is not JSON: {e}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {os.fspath(path)!r} holds no JSON object")
    return content


_OFFICIAL_KEYS = {
    "arch_layout", "d_model", "d_intermediate", "vocab_size", "ssm_cfg", "attn_cfg",
    "tie_embeddings",
}  # fmt: skip
_OFFICIAL_SSM = {"chunk_size", "d_conv", "d_state", "expand"}
_OFFICIAL_ATTENTION = {"num_heads", "rotary_emb_dim", "window_size"}


def _from_official(content: dict[str, Any]) -> HNetConfig:
    ssm: Any = content.get("ssm_cfg", {})
    attention: Any = content.get("attn_cfg")
    vocab_size, tied = content.get("vocab_size", 256), content.get("tie_embeddings", False)
    for name, keys, known in (
        ("configuration", content, _OFFICIAL_KEYS),
        ("ssm_cfg", ssm, _OFFICIAL_SSM),
        ("attn_cfg", attention, _OFFICIAL_ATTENTION),
    ):
        if not isinstance(keys, dict) or keys.keys() - known:
            unknown = sorted(keys.keys() - known) if isinstance(keys, dict) else keys
            raise ConfigError(
                f"official {name} has unknown content {reprlib.repr(unknown)}: the format has "
                f"{sorted(known)}"
            )
    if not _whole([*ssm.values(), vocab_size]) or not isinstance(tied, bool):
        raise ConfigError(
            f"official ssm_cfg={reprlib.repr(ssm)}, vocab_size={reprlib.repr(vocab_size)} and "
            f"tie_embeddings={reprlib.repr(tied)}: give whole numbers, and true or false"
        )
    layouts = _flatten_layout(content.get("arch_layout"))
    lists: dict[str, Any] = {name: content.get(name) for name in ("d_model", "d_intermediate")}
    lists |= {name: attention.get(name) for name in sorted(_OFFICIAL_ATTENTION)}
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != len(layouts) or not _whole(values):
            raise ConfigError(
                f"official {name}={reprlib.repr(values)}: give a list of {len(layouts)} whole "
                "numbers, one for each stage of arch_layout"
            )
    stages = tuple(
        StageConfig(layout, **{name: values[i] for name, values in lists.items()})
        for i, layout in enumerate(layouts)
    )
    if len(stages) > 2:  # official target ratios: 6 with one chunking stage, 3 in each of two
        cut = tuple(replace(stage, chunking=ChunkingConfig(3.0)) for stage in stages[:-1])
        stages = (*cut, stages[-1])
    return HNetConfig(stages, vocab_size, SSMConfig(**ssm), tied)


def _whole(values: list[Any]) -> bool:
    return all(type(v) is int and abs(v) < 2**31 for v in values)


def _flatten_layout(nested: Any) -> list[tuple[str, ...]]:
    """``["m4", ["T22"], "m4"]`` -> ``[("m4", "m4"), ("T22",)]``."""
    flat: list[tuple[str, ...]] = []
    while True:
        match nested:
            case [str(stack)]:
                return [*flat, (stack,)]
            case [str(encoder), list(inner), str(decoder)]:
                flat.append((encoder, decoder))
                nested = inner
            case _:
                raise ConfigError(
                    f"arch_layout {reprlib.repr(nested)} is not [encoder, [inner], decoder] or "
                    "[stack]"
                )


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
