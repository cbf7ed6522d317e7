"""Parameters and floating-point operations of a network, from its configuration alone.

Operations are a table of `Term`s, a line for each matmul or group of element-wise operations, for
one row of text. A multiply-add is two operations. There are two conventions:

`published`  arXiv 2507.07955, appendix B: attention is not halved for causality, an embedding is a
             matmul, the SSD is its recurrence; routing, residual projection and smoothing are not
             counted. For comparison with published numbers.
`executed`   what `hnet` runs: attention and SSD in blocks, every chunk slot whether filled or not,
             each row as one segment, routing and smoothing; element-wise operations as XLA counts
             them, one an element and none for exp, log and rsqrt. For rooflines and utilisation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.dechunk import EMA_BLOCK
from hnet.chunking.routes import BLOCKS_PER_ROUTE, MIN_BLOCK
from hnet.config import HNetConfig, StageConfig, parse_layout
from hnet.errors import ConfigError

Convention = Literal["published", "executed"]

# Element-wise operations an element, as hnet.nn and hnet.chunking spell them.
_NORM = 4  # square, sum, times 1/rms, times scale
_SILU = 4  # negation, plus one, division, product
_MASK = 3  # two comparisons, and
_SOFTMAX = 4  # mask, max, minus max, sum
_DECAY = 5  # two differences of exponents, their sum, mask, times scores
_GATE = 4 + _SILU  # of Mamba-2: times dt, skip, silu, product
_GELU = 83  # erfc is a polynomial of two branches
_ROUTE = 8  # q and k: square, sum, times 1/norm; product and sum


@dataclass(frozen=True)
class Term:
    """Forward operations of one kind in one part, for one row."""

    part: str  # "embedding", "stage0/encoder", "stage0/routing", ..., "head"
    name: str
    # matmul with a parameter, matmul between activations, or neither
    kind: Literal["weight", "mixing", "elementwise"]
    flops: float
    recomputed: bool = False  # again in every backward pass, whatever `compute.remat` says
    closing: bool = False  # last matmul of a layer: linear, so recomputation leaves it out


def param_counts(config: HNetConfig) -> dict[str, int]:
    """Parameters of each part; they sum to the model's. ``embedding`` stands alone."""
    counts = {"embedding": config.vocab_size * config.stages[0].d_model}
    outer = config.stages[0].d_model
    for s, stage in enumerate(config.stages):
        D, outer, widened = stage.d_model, stage.d_model, stage.d_model - outer
        stacks = [_stack_params(config, stage, layout) for layout in stage.arch_layout]
        if widened:
            counts[f"stage{s}/pad_dimension"] = widened
        if s == config.num_chunked:
            counts[f"stage{s}/main_network"] = stacks[0]
        else:
            cut = stage.chunking
            parts = {
                "encoder": stacks[0],
                "routing": _router_params(cut, D) * cut.num_predictors,
                "boundary_offset": cut.routes * cut.hold_rate,
                "residual_proj": (D * D + D) * (cut.residual == "linear"),
                "null_group": D * cut.has_null,
                "decoder": stacks[1],
            }
            counts |= {f"stage{s}/{name}": size for name, size in parts.items() if size}
    return counts | {"head": 0 if config.tie_embeddings else counts["embedding"]}


def _router_params(cut: ChunkingConfig, D: int) -> int:
    hidden = cut.mlp_width or 4 * D
    return {"cosine": 2 * D * D, "mlp": hidden * (D + 2) + 1}.get(cut.router, 0)


def _stack_params(config: HNetConfig, stage: StageConfig, layout: str) -> int:
    D, N = stage.d_model, config.ssm.d_state
    inner, heads = _mamba_sizes(config, stage)
    conv = inner + 2 * N
    mixers = {
        "m": D * (inner + conv + heads)  # in_proj
        + conv * (config.ssm.d_conv + 1)  # taps and bias
        + 3 * heads  # A_log, D, dt_bias
        + inner  # gated norm
        + inner * D,  # out_proj
        "t": 4 * D * D,  # Wqkv, out_proj
    }
    mlp = 3 * D * stage.d_mlp + D  # fc1, fc2, norm2
    layers = parse_layout(layout)
    return D + sum(n * (mixers[kind.lower()] + D + mlp * kind.isupper()) for kind, n in layers)


def _mamba_sizes(config: HNetConfig, stage: StageConfig) -> tuple[int, int]:
    """(inner width, heads) of a Mamba-2 mixer."""
    inner = config.ssm.expand * stage.d_model
    return inner, inner // config.ssm.head_dim


def stage_lengths(
    config: HNetConfig, seq_len: int, boundary_rates: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Mean positions of each stage in a row of `seq_len` bytes, outermost first.

    boundary_rates: chunks a position in each stage that cuts; the default is the configured
    1 / target_ratio. Raises ConfigError for a rate outside (0, 1] or a wrong number of them.
    """
    cutting = config.stages[: config.num_chunked]
    if boundary_rates is None:
        boundary_rates = tuple(1 / stage.chunking.target_ratio for stage in cutting)
    if len(boundary_rates) != len(cutting) or not all(0 < rate <= 1 for rate in boundary_rates):
        needed = f"give each of the {len(cutting)} stages that cut a rate above 0 and up to 1"
        raise ConfigError(f"boundary_rates={boundary_rates!r}: {needed}")
    return tuple(seq_len * math.prod(boundary_rates[:s]) for s in range(len(config.stages)))


def forward_terms(
    config: HNetConfig, lengths: tuple[float, ...], convention: Convention = "executed"
) -> tuple[Term, ...]:
    """Forward operations of one row, in the order they run.

    lengths: positions of each stage: `stage_lengths`, or the bytes of a row followed by the chunk
    slots that its capacities give it, which is what is executed. Raises ConfigError if there is
    not one for each stage.
    """
    if len(lengths) != len(config.stages):
        raise ConfigError(f"lengths={lengths!r}: give each of the {len(config.stages)} stages one")
    if convention == "executed":  # a program has whole slots
        lengths = tuple(math.ceil(length) for length in lengths)
    table = 2 * lengths[0] * config.vocab_size * config.stages[0].d_model
    terms = [*_stage_terms(config, lengths, convention, 0)]
    terms.append(Term("head", "lm_head", "weight", table))
    if convention == "published":
        terms.insert(0, Term("embedding", "one-hot rows", "weight", table))
    return tuple(terms)


def _stage_terms(
    config: HNetConfig, lengths: tuple[float, ...], convention: Convention, s: int
) -> Iterator[Term]:
    stage, S, D = config.stages[s], lengths[s], config.stages[s].d_model
    mixers = {"t": _attention, "m": _mamba}

    def stack(part: str, layout: str) -> Iterator[Term]:
        for kind, count in parse_layout(layout):
            lines = mixers[kind.lower()](config, stage, S, convention)
            lines += _mlp(stage, S, convention) * kind.isupper()
            for name, operands, flops, *recomputed in lines:
                term = Term(f"stage{s}/{part}", name, operands, count * flops, *recomputed)
                yield replace(term, closing=name == lines[-1][0])
        if convention == "executed":
            yield Term(f"stage{s}/{part}", "rmsnorm", "elementwise", _NORM * S * D)

    if s == config.num_chunked:
        yield from stack("main_network", stage.arch_layout[0])
        return
    yield from stack("encoder", stage.arch_layout[0])
    if convention == "executed":
        yield from _cut(f"stage{s}", stage.chunking, S, D)
    yield from _stage_terms(config, lengths, convention, s + 1)
    if convention == "executed":
        if stage.chunking.dechunk == "ema":
            yield from _ema(f"stage{s}/dechunk", lengths[s + 1], D)
        yield Term(f"stage{s}/dechunk", "gather, residual", "elementwise", 3 * S * D)
    yield from stack("decoder", stage.arch_layout[1])


def _cut(stage: str, cut: ChunkingConfig, S: int, D: int) -> Iterator[Term]:
    """Router, residual projection and pool: hnet.chunking, hnet.stage."""
    R, hidden, positions = cut.num_predictors, cut.mlp_width or 4 * D, S
    if R > 1:  # packed into blocks of one route each: hnet.chunking.routes
        block = max(MIN_BLOCK, math.ceil(S / (BLOCKS_PER_ROUTE * R)))
        positions = min(S, (S + R * (block - 1)) // block) * block
    if cut.router == "cosine":
        matmuls, small = 4 * D * D, _ROUTE * D
    elif cut.router == "mlp":
        matmuls, small = 2 * D * hidden + 2 * hidden, _GELU * hidden
    else:
        matmuls = small = 0
    yield Term(f"{stage}/routing", cut.router, "weight", matmuls * positions, R > 1)
    yield Term(f"{stage}/routing", "p", "elementwise", small * positions, R > 1)
    if cut.residual == "linear":
        yield Term(f"{stage}/residual_proj", "linear", "weight", 2 * S * D * D + S * D)
    if cut.pool == "mean":
        yield from _ema(f"{stage}/pool", S, D)


def _ema(part: str, S: int, D: int) -> Iterator[Term]:
    block = min(EMA_BLOCK, S)  # hnet.chunking.dechunk.ema
    blocks = math.ceil(S / block)
    yield Term(part, "ema", "mixing", 2 * blocks * block**2 * D)
    if blocks > 1:
        yield Term(part, "ema carry", "elementwise", 2 * blocks * block * D)
        yield from _ema(part, blocks, D)


def _attention(
    config: HNetConfig, stage: StageConfig, S: float, convention: Convention
) -> list[tuple]:
    D, H, window = stage.d_model, stage.num_heads, stage.window_size
    pairs = S * (S if window < 0 else min(S, window + 1))  # of a query and a key
    if convention == "published":
        return [
            ("Wqkv", "weight", 6 * S * D * D),
            ("scores, values", "mixing", 4 * pairs * D),
            ("softmax", "elementwise", 3 * H * pairs),
            ("out_proj", "weight", 2 * S * D * D),
        ]
    block = min(config.compute.attention_block_len, S)  # hnet.nn.attention.attention
    blocks = math.ceil(S / block)
    first = [0 if window < 0 else max(0, i * block - window) // block for i in range(blocks)]
    visited = sum(i + 1 - j for i, j in enumerate(first))  # of a block of queries and one of keys
    pairs, padded = visited * block**2, blocks * block  # masked pairs are computed too
    carried = 2 * visited * block * D + 2 * padded * D  # sums so far shrink; scale, division
    return [
        ("norm1, addition", "elementwise", (_NORM + 1) * S * D),
        ("Wqkv", "weight", 6 * S * D * D),
        ("rotary", "elementwise", 3 * S * H * stage.rotary_emb_dim),
        ("scores", "mixing", 2 * pairs * D, True),
        ("softmax", "elementwise", (_SOFTMAX * H + _MASK) * pairs + carried, True),
        ("values", "mixing", 2 * pairs * D),
        ("out_proj", "weight", 2 * S * D * D),
    ]


def _mamba(config: HNetConfig, stage: StageConfig, S: float, convention: Convention) -> list[tuple]:
    D, N, taps = stage.d_model, config.ssm.d_state, config.ssm.d_conv
    inner, heads = _mamba_sizes(config, stage)
    # appendix B prints out_proj as D x D, which cannot give MambaByte's published figure
    in_proj, out_proj = 2 * S * D * (2 * inner + 2 * N + heads), 2 * S * inner * D
    if convention == "published":
        return [
            ("in_proj", "weight", in_proj),
            ("conv", "elementwise", 2 * S * D * taps),
            ("ssd", "mixing", 6 * S * inner * N),
            ("gate", "elementwise", 5 * S * D),
            ("out_proj", "weight", out_proj),
        ]
    block = min(config.compute.ssd_block_len, S)  # hnet.nn.ssd
    blocks = math.ceil(S / block)
    padded, state = blocks * block, inner * N * (blocks > 1)
    between = padded * (2 * heads * N + inner) * (blocks > 1)  # B to the end, C from it, addition
    return [
        ("norm1, addition", "elementwise", (_NORM + 1) * S * D),
        ("in_proj", "weight", in_proj),
        ("conv", "elementwise", (3 * taps + _SILU) * S * (inner + 2 * N)),
        ("ssd decay", "elementwise", (_DECAY * heads + _MASK) * padded * block),
        ("ssd in block", "mixing", 2 * padded * block * (N + inner)),
        ("ssd states", "mixing", 4 * padded * state),
        ("ssd sums", "mixing", 6 * heads * padded * block),
        ("ssd carry", "elementwise", 2 * blocks * state + between),
        ("gate, norm", "elementwise", (_GATE + _NORM) * S * inner),
        ("out_proj", "weight", out_proj),
    ]


def _mlp(stage: StageConfig, S: float, convention: Convention) -> list[tuple]:
    D, F = stage.d_model, stage.d_mlp
    small = 5 * D if convention == "published" else (_SILU + 1) * F + (_NORM + 1) * D
    return [
        ("fc1", "weight", 4 * S * D * F),
        ("norm2, gate", "elementwise", small * S),
        ("fc2", "weight", 2 * S * F * D),
    ]


def flops_by_part(terms: tuple[Term, ...]) -> dict[str, float]:
    """Forward operations of each part, in the order of `terms`; they sum to the row's."""
    sums = dict.fromkeys((term.part for term in terms), 0.0)
    for term in terms:
        sums[term.part] += term.flops
    return sums


def training_flops(terms: tuple[Term, ...], remat: str = "none") -> float:
    """Forward, a backward of twice its operations, and what the backward pass computes again.

    remat: as `compute.remat`: "layer" repeats every stack, "dots" all but its matmuls with
    parameters. Attention repeats its scores whichever is chosen.
    """

    def again(term: Term) -> int:
        in_stack = term.part.endswith(("encoder", "main_network", "decoder"))
        layer = remat == "layer" and not term.closing
        activations = remat == "dots" and term.kind != "weight"
        return term.recomputed + (in_stack and (layer or activations))

    return sum((3 + again(term)) * term.flops for term in terms)
