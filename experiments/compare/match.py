"""Widths of a network at a given cost: training FLOPs per byte, parameters, or seconds per byte.

A network is scaled as a whole: the widths of its stages keep their proportions, as far as heads,
Mamba-2 and MLPs allow. The layers, the chunking and all other settings stay as they are.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from hnet.config import ChunkingConfig, HNetConfig, StageConfig
from hnet.data import Corpus, train_batches
from hnet.data.scripts import route_table, script_ids
from hnet.decode.segment import segment_all, segmenter
from hnet.errors import ConfigError
from hnet.flops import param_counts, stage_lengths, total, training_flops
from hnet.layout import parse_layout
from hnet.model import abstract, init_params
from hnet.train.compiled_run import build, put_batch, rows_that_share
from hnet.train.config import Config

WIDEST = 4096
CLOSE = 0.01  # relative difference of the cost below which no better widths are looked for
TIMED_STEPS = 5

Rates = tuple[float, ...]
"""chunks per position of each stage that chunks, outermost first"""


def parameters(model: HNetConfig) -> int:
    return sum(param_counts(model).values())


def flops_per_byte(config: Config, rates: Rates, bytes_per_position: float = 1.0) -> float:
    """Training FLOPs per source byte as executed, at these boundary rates (`hnet.flops`)."""
    length = config.data.seq_len
    lengths = stage_lengths(config.model, length, rates)
    parts = training_flops(config.model, lengths, rows_that_share(config, shards=1))
    return total(parts) / (length * bytes_per_position)


def seconds_per_byte(
    config: Config, rates: Rates, corpus: Corpus, bytes_per_position: float = 1.0
) -> float:
    """Median seconds of a training step on this machine, per source byte."""
    program = build(config)
    state, slots = program.init(), stage_lengths(config.model, config.data.seq_len, rates)[1:]
    rows_sharing_slots = program.ladder.rows_sharing_slots
    capacities = tuple(
        min(full, math.ceil(1.1 * rows_sharing_slots * n))
        for full, n in zip(program.ladder.full, slots)
    )
    groups, seconds = config.model.route_groups, []
    with train_batches(corpus, config.data, seed=0, route_groups=groups) as batches:
        batch = put_batch(next(batches), program.mesh)
    for _ in range(TIMED_STEPS + 2):
        began = time.perf_counter()
        results = program.step(state, batch, program.hparams, capacities=capacities)
        state, _ = jax.block_until_ready(results)
        seconds.append(time.perf_counter() - began)
    positions = config.data.batch_size * config.data.seq_len
    return statistics.median(seconds[2:]) / (positions * bytes_per_position)


def expected_rates(model: HNetConfig, texts: Sequence[bytes], *, bos: bool) -> Rates:
    """Boundary rate of each stage on texts of this kind.

    Rates of learned predictors are the targets of the scripts in the texts. Rates of rules are
    counted, with the narrowest network of this kind. bos: whether training puts BOS before each
    text (`data.bos_eos`).
    """
    chunkings = [stage.chunking for stage in model.stages[:-1]]
    counted = _counted_rates(model, texts, bos) if any(map(_is_counted, chunkings)) else ()
    scripts = np.concatenate([script_ids(text)[0] for text in texts])
    routes = route_table(model.route_groups, "model.route_groups")[scripts]
    shares = np.bincount(routes, minlength=model.num_routes) / len(routes)
    rates = []
    for s, cut in enumerate(chunkings):
        targets = np.reciprocal(np.asarray(cut.target_ratios))
        mean = float(shares @ targets) if cut.routes > 1 else float(targets[0])
        rates.append(counted[s] if _is_counted(cut) else mean)
    return tuple(rates)


def _is_counted(cut: ChunkingConfig) -> bool:
    """Whether the rate of a predictor is neither learned nor fixed."""
    return not (cut.predictor.part.is_learned or cut.predictor.name == "fixed")


def _counted_rates(model: HNetConfig, texts: Sequence[bytes], bos: bool) -> Rates:
    """Boundary rates of a narrow random network with these predictors and few layers."""
    small = sizes(model)[0]
    with contextlib.suppress(ConfigError):  # some parts need certain layers
        short = [replace(s, arch_layout=("t1",) * len(s.arch_layout)) for s in small.stages]
        small = replace(small, stages=tuple(short))
    graph, params = abstract(small)[0], init_params(small, jax.random.key(0))
    found = segment_all(segmenter(graph, small, bos=bos), params, texts)
    rates = []
    for s in range(small.num_chunked):
        chunks = sum(len(seg.stages[s].starts) for seg in found)
        rates.append(chunks / sum(len(seg.positions(s)) for seg in found))
    return tuple(rates)


def scaled_stage(stage: StageConfig, width: int) -> StageConfig:
    """The stage with another width; heads, rotary channels and MLPs in proportion."""
    heads, rotary, total = stage.num_heads, stage.rotary_emb_dim, width
    named, width = stage.of_one_vector.d_model, width // stage.vectors
    if heads:
        share = rotary * heads / named
        heads = next(h for h in range(min(heads, width), 0, -1) if width % h == 0)
        rotary = min(width // heads // 2, max(1, round(share * width / heads / 2))) * 2
        rotary = rotary if stage.rotary_emb_dim else 0
    wide = stage.d_intermediate / named * width
    d_mlp = max(128, round(wide / 128) * 128) if wide else 0
    return replace(
        stage, d_model=total, d_intermediate=d_mlp, num_heads=heads, rotary_emb_dim=rotary
    )


def _reading(stage: StageConfig, width: int) -> StageConfig:
    """A stage with several passes, whose decoder reads vectors of this width."""
    chunking, memory = stage.chunking, replace(stage.cross_attention, memory_width=width)
    dechunk = replace(chunking.dechunk, width=width)
    return replace(stage, chunking=replace(chunking, dechunk=dechunk), cross_attention=memory)


def with_widths(model: HNetConfig, widths: Sequence[int]) -> HNetConfig | None:
    """The network with these widths of its stages; None if its layers do not allow them."""
    try:
        stages = [scaled_stage(s, width) for s, width in zip(model.stages, widths)]
        for i, stage in enumerate(stages[:-1]):
            if stage.passes > 1:
                stages[i] = _reading(stage, stages[i + 1].of_one_vector.d_model)
        inner = [
            model.ssm.expand * stage.d_model
            for stage in stages
            if any(k in "mM" for part in stage.arch_layout for k, _ in parse_layout(part))
        ]
        ssm = model.ssm
        if inner:
            common = math.gcd(*inner)
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            near = min(divisors, key=lambda d: abs(math.log(d / ssm.head_dim)))
            ssm = replace(ssm, head_dim=near)
        return replace(model, stages=tuple(stages), ssm=ssm)
    except ConfigError:
        return None


def step_of(width: int) -> int:
    """Distance of neighbouring widths: a power of two, at least 4, about 1/16 of the width."""
    return max(4, 1 << max(0, (width // 16).bit_length() - 1))


def _rounded(width: float) -> int:
    step = step_of(int(width))
    return max(step, round(width / step) * step)


def sizes(model: HNetConfig) -> list[HNetConfig]:
    """The network at all widths that its layers allow, narrow to wide. Raises ConfigError."""
    named, width, found = [stage.d_model for stage in model.stages], 4, []
    while width <= max(WIDEST, named[-1]):
        widths = [min(width, _rounded(own * width / named[-1])) for own in named]
        if each := with_widths(model, widths):
            found.append(each)
        width += step_of(width)
    if not found:
        raise ConfigError(f"the layers of {model.arch_layout} allow no width up to {width}")
    return found


def at_cost(
    model: HNetConfig, cost: Callable[[HNetConfig], float], budget: float
) -> tuple[HNetConfig, float]:
    """(network of this kind whose cost is nearest to the budget, its cost).

    The cost must grow with the width. Raises ConfigError if the narrowest network costs more than
    twice the budget, or the widest less than half.
    """
    known: dict[HNetConfig, float] = {}

    def of(each: HNetConfig) -> float:
        if each not in known:
            known[each] = cost(each)
        return known[each]

    found = sizes(model)
    low, high = 0, len(found) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(found[middle]) < budget else (low, middle)
    off = lambda each: abs(math.log(of(each) / budget))
    best = min((found[low], found[high]), key=off)
    if off(best) > CLOSE:
        best = min((best, *_neighbours(best)), key=off)
    if off(best) > math.log(2):
        raise ConfigError(
            f"the nearest width, {best.stages[-1].d_model}, costs {of(best):.3g} and not "
            f"{budget:.3g}: choose another size"
        )
    return best, of(best)


def _neighbours(model: HNetConfig) -> list[HNetConfig]:
    """The network with the width of one stage, or of one stage's MLPs, a step larger or smaller."""
    widths = [stage.d_model for stage in model.stages]
    found = []
    for s, stage in enumerate(model.stages):
        for step in (-1, 1):
            own = [*widths[:s], widths[s] + step * step_of(widths[s]), *widths[s + 1 :]]
            if min(own) > 0:
                found.append(with_widths(model, own))
            if stage.d_intermediate and (d_mlp := stage.d_mlp + 128 * step) >= 128:
                wider = replace(stage, d_intermediate=d_mlp)
                stages = (*model.stages[:s], wider, *model.stages[s + 1 :])
                found.append(replace(model, stages=stages))
    return [each for each in found if each]
