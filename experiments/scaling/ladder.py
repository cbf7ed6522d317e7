"""Sizes of four kinds of model at matched FLOPs per byte, with the published recipe scaled to them.

A level is the width of a Transformer over BPE tokens. The other kinds of the level must cost the
same FLOPs per byte. Widths, depths and kinds of layers follow the published models (arXiv
2507.07955: L is level 1536, XL is 2048); the depth of each main network and the width of its MLPs
are chosen to match the FLOPs. FLOPs are counted as published (`hnet.flops_published`), at the bytes
per chunk that the published models reached.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.errors import ConfigError
from hnet.flops import param_counts, stage_lengths
from hnet.flops_published import published_flops
from hnet.layout import layout_runs
from hnet.train.config import Config, OptimConfig

Family = Literal["bpe", "bytes", "hnet1", "hnet2"]
FAMILIES: tuple[Family, ...] = ("bpe", "bytes", "hnet1", "hnet2")
BYTES_PER_TOKEN = 8192 / 1792  # GPT-2 tokenizer on FineWeb-Edu, as published
GPT2_VOCABULARY = 50_257
CHUNK_BYTES = {"hnet1": (4.8,), "hnet2": (7.0**0.5,) * 2}  # reached by the published models
TARGETS = {"hnet1": (6.0,), "hnet2": (3.0, 3.0)}
WINDOW = 1023  # number of previous bytes that outer attention sees
MLP_SEARCH = 0.25  # relative deviation allowed from an MLP width of 8/3 of the model's width


@dataclass(frozen=True)
class Point:
    """One model of the ladder and its training run, without what depends on the machine."""

    name: str
    family: Family
    level: int
    layers: int
    """number of layers of the main network"""
    parameters: int
    flops_per_byte: float
    """FLOPs per byte of the forward pass"""
    mismatch: float
    """relative difference of flops_per_byte from that of the level"""
    train_bytes: int
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    train_flops: float
    """FLOPs of the training run, forward and backward over all bytes"""


def heads(width: int) -> dict[str, int]:
    """At most 16 heads of at least 32 channels each; half of each head is rotated."""
    count = next(h for h in (16, 8, 4, 2, 1) if width % h == 0 and (width // h >= 32 or h == 1))
    return {"num_heads": count, "rotary_emb_dim": width // count // 4 * 2}


def mlp_width(width: int) -> int:
    """8/3 of the model's width, rounded up to a multiple of 128."""
    return -(-8 * width // 3 // 128) * 128


def depth(level: int) -> int:
    """Number of layers of the Transformer over tokens: one per 64 channels, from 2 to 24."""
    return min(24, max(2, round(level / 64)))


def peak_learning_rate(level: int) -> float:
    """Power law in the width through the published 6.25e-4 at 1536 and 5e-4 at 2048."""
    return 6.25e-4 * (level / 1536) ** (math.log(0.8) / math.log(2048 / 1536))


def outer_widths(level: int) -> list[int]:
    """Candidate widths of the outermost stage, the usual one first: 2/3 of the level as in the
    published L, at most 1024. Narrower ones are for small levels, where the usual width would by
    itself cost more than the level."""
    usual = max(32, min(1024, round(2 * level / 3 / 32) * 32))
    return list(range(usual, max(31, level // 4 - 1), -32))


def make_model(
    family: Family, level: int, outer: int, layers: int, d_mlp: int, vocab_size: int = 256
) -> HNetConfig:
    """The network of a family; layers and d_mlp are those of its main network."""
    count = max(1, round(depth(level) / 6))  # number of Mamba-2 layers on each side
    main = StageConfig((f"T{layers}",), level, d_mlp, **heads(level))
    match family:
        case "bpe":
            return HNetConfig((main,), vocab_size=vocab_size)
        case "bytes":
            stage = StageConfig((f"T{layers}",), outer, d_mlp, window_size=WINDOW, **heads(outer))
            return HNetConfig((stage,))
        case "hnet1" | "hnet2":
            pass
        case _:
            raise ValueError(f"family {family!r} is unknown")
    cuts = [ChunkingConfig(ratio) for ratio in TARGETS[family]]
    first = StageConfig(
        (f"m{count}", f"m{count}"), outer, window_size=WINDOW, chunking=cuts[0], **heads(outer)
    )
    if family == "hnet1":
        return HNetConfig((first, main))
    width = outer if level <= 1536 else round(0.75 * level / 32) * 32  # as published
    layouts = (f"T1m{count}", f"m{count}T1")
    second = StageConfig(
        layouts, width, mlp_width(width), window_size=WINDOW, chunking=cuts[1], **heads(width)
    )  # fmt: skip
    return HNetConfig((first, second, main))


def flops_per_byte(
    family: Family, model: HNetConfig, seq_len: int, bytes_per_token: float
) -> float:
    """Forward FLOPs per byte over rows of `seq_len` bytes."""
    rates = tuple(1 / size for size in CHUNK_BYTES.get(family, ()))
    positions = seq_len / bytes_per_token if family == "bpe" else seq_len
    parts = published_flops(model, stage_lengths(model, positions, rates))
    return sum(parts.values()) / seq_len


def match(make: Callable[[int, int], HNetConfig], width: int, cost, target: float):
    """(layers, MLP width) whose cost is nearest to the target; the cost grows with both.

    The MLP width stays at 8/3 of the model's `width` if the cost is then within 1 % of the target.
    """
    usual = mlp_width(width)
    spread = max(1, int(MLP_SEARCH * usual / 128))
    layers = 1
    while cost(make(layers, usual)) < target and layers < 512:
        layers += 1
    found = [
        (abs(cost(make(n, ff)) / target - 1), abs(ff - usual), n, ff)
        for n in {max(1, layers - 1), layers}
        for ff in (usual + 128 * k for k in range(-spread, spread + 1))
        if ff >= 128
    ]
    _, _, n, ff = min(found, key=lambda f: (max(f[0], 0.01), f[1]))
    return n, ff


def make_points(
    base: Config,
    levels: tuple[int, ...],
    families: tuple[Family, ...],
    *,
    bytes_per_parameter: float,
    bytes_per_token: float = BYTES_PER_TOKEN,
    vocab_size: int = GPT2_VOCABULARY,
) -> list[tuple[Point, HNetConfig]]:
    """The ladder, level by level. base: rows, batch and all other settings that are not scaled.

    Every model of a level sees the same number of bytes: `bytes_per_parameter` times the
    non-embedding parameters of the level's Transformer over tokens. Raises ConfigError if no model
    matches a level.
    """
    if bad := [level for level in levels if level < 64 or level % 32]:
        raise ConfigError(f"levels={bad}: use widths from 64 on, multiples of 32")
    points, seq_len, batch = [], base.data.seq_len, base.data.batch_size
    for level in levels:
        usual = mlp_width(level)
        reference = make_model("bpe", level, level, depth(level), usual, vocab_size)
        target = flops_per_byte("bpe", reference, seq_len, bytes_per_token)
        parts = param_counts(reference)
        size = sum(parts.values()) - parts["embeddings"] - parts["lm_head"]
        steps = max(1, round(bytes_per_parameter * size / (batch * seq_len)))
        for family in families:
            cost = lambda m, f=family: flops_per_byte(f, m, seq_len, bytes_per_token)
            layers, model = depth(level), reference
            if family != "bpe":
                layers, model = _matched(family, level, cost, target)
            model = replace(model, compute=base.model.compute)
            row = seq_len if family != "bpe" else max(2, round(seq_len / bytes_per_token))
            each, seen = cost(model), steps * batch * seq_len
            point = Point(
                f"{family}-{level}", family, level, layers, sum(param_counts(model).values()),
                each, each / target - 1, seen, steps, batch, row, peak_learning_rate(level),
                3 * each * seen,
            )  # fmt: skip
            points.append((point, model))
    return points


def _matched(family: Family, level: int, cost, target: float) -> tuple[int, HNetConfig]:
    """(number of layers of the main network, model) of a family at the cost of a level."""
    for outer in outer_widths(level):
        make = lambda n, d_mlp, outer=outer: make_model(family, level, outer, n, d_mlp)
        width = make(1, 128).stages[-1].d_model
        if cost(make(1, mlp_width(width))) <= target:
            break
    layers, d_mlp = match(make, width, cost, target)
    return layers, make(layers, d_mlp)


def point_config(base: Config, point: Point, model: HNetConfig, tokenizer: str) -> Config:
    """Configuration for `pretrain`. Published recipe: AdamW; warm-up, constant rate and decay over
    10, 70 and 20 % of the steps; learning-rate multipliers by stage (none for token models)."""
    multipliers = "none" if point.family == "bpe" else "published"
    return replace(
        base,
        model=model,
        data=replace(
            base.data, seq_len=point.seq_len, tokenizer=tokenizer if point.family == "bpe" else ""
        ),
        optim=OptimConfig(learning_rate=point.learning_rate, lr_multipliers=multipliers),
        train=replace(base.train, steps=point.steps),
        eval=replace(base.eval, every=max(1, point.steps // 4)),
        checkpoint=replace(base.checkpoint, every=max(1, point.steps // 4)),
    )


def estimated_bytes(config: Config) -> float:
    """Estimated memory per device: float32 parameters, two moments and gradients, sharded over fsdp
    and tensor; and the activations kept for the backward pass, about 16 states per layer (2 with
    remat "layer")."""
    mesh, model = config.mesh, config.model
    shards = max(1, mesh.fsdp) * max(1, mesh.tensor)
    state = 16 * sum(param_counts(model).values()) / shards
    rows = config.data.batch_size / (max(1, mesh.data) * max(1, mesh.fsdp))
    width = 2 if model.compute.dtype == "bfloat16" else 4
    kept = 2 if model.compute.remat == "layer" else 16
    states = 0.0
    for stage, positions in zip(model.stages, stage_lengths(model, config.data.seq_len)):
        layers = sum(n for part in stage.arch_layout for _, n in layout_runs(part))
        states += layers * positions * stage.d_model
    logits = 2 * config.data.seq_len * model.vocab_size * 4
    return state + rows / config.train.accumulate * (kept * width * states + logits)
