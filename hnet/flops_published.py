"""Forward operations in the convention of papers: formulas of arXiv 2507.07955, appendix B.

Attention is not halved for causality, an embedding counts as a matmul, the SSD as its recurrence;
boundary prediction, residual projection and smoothing are not counted. Use it for comparison with
published numbers; `hnet.flops` counts the operations of our own program.
"""

from hnet.config import HNetConfig, StageConfig
from hnet.errors import ConfigError
from hnet.flops import check_lengths
from hnet.layout import parse_layout


def published_flops(config: HNetConfig, lengths: tuple[float, ...]) -> dict[str, float]:
    """Operations of each part for one row with `lengths` positions in each stage.

    Raises ConfigError if there is not one length per stage, or for a layer without a published
    formula.
    """
    check_lengths(config, lengths)
    table = 2 * lengths[0] * config.vocab_size * config.stages[0].d_model
    parts, after = {"embeddings": table}, {"lm_head": table}
    for s, (stage, positions) in enumerate(zip(config.stages, lengths)):
        costs = [_stack(config, stage, layout, positions) for layout in stage.arch_layout]
        if s == config.num_chunked:
            parts[f"stage{s}/main_network"] = costs[0]
        else:
            parts[f"stage{s}/encoder"] = costs[0]
            after = {f"stage{s}/decoder": costs[1], **after}
    return parts | after


def _stack(config: HNetConfig, stage: StageConfig, layout: str, S: float) -> float:
    if stage.vectors > 1:
        raise ConfigError(f"vectors={stage.vectors}: no published count, use 1")
    total = 0.0
    for kind, layers in parse_layout(layout):
        match kind:
            case "t" | "T":
                each = _attention(stage, S)
            case "m" | "M":
                each = _mamba(config, stage, S)
            case _:
                raise ConfigError(
                    f"layer {kind!r} of {layout!r}: no published count, use m, M, t, T"
                )
        total += layers * (each + _mlp(stage, S) * kind.isupper())
    return total


def _attention(stage: StageConfig, S: float) -> float:
    D, H, window = stage.d_model, stage.num_heads, stage.window_size
    pairs = S * (S if window < 0 else min(S, window + 1))  # number of query-key pairs
    # Wqkv and out_proj; scores and values; softmax
    return 8 * S * D * D + 4 * pairs * D + 3 * H * pairs


def _mamba(config: HNetConfig, stage: StageConfig, S: float) -> float:
    D, N, inner = stage.d_model, config.ssm.d_state, config.ssm.expand * stage.d_model
    heads = inner // config.ssm.head_dim
    in_proj = 2 * S * D * (2 * inner + 2 * N + heads)
    # The paper prints out_proj as D x D, which cannot give MambaByte's published figure.
    out_proj = 2 * S * inner * D
    conv, ssd, gate = 2 * S * D * config.ssm.d_conv, 6 * S * inner * N, 5 * S * D
    return in_proj + conv + ssd + gate + out_proj


def _mlp(stage: StageConfig, S: float) -> float:
    return 6 * S * stage.d_model * stage.d_mlp + 5 * S * stage.d_model
