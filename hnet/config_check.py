"""Checks of a network's configuration across its fields, and its approximate size."""

import reprlib
from typing import Any

from hnet.architecture import Architecture, StageConfig
from hnet.chunking.part import Place
from hnet.errors import ConfigError
from hnet.fields import check
from hnet.layout import is_class, layout_runs, parse_layout
from hnet.nn.mixers import check_further, find, ignores_key_bias, reads_memory
from hnet.nn.stack import find_stack


def check_network(config: Architecture) -> None:
    """Raise ConfigError if the network cannot be built."""
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


def _check_stage(config: Architecture, i: int, stage: StageConfig) -> None:
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
        kinds = sorted({k for part in stage.arch_layout for k, _ in runs(part)})
        own = find_stack(stage.arch_layout[0]) if inner and is_class(stage.arch_layout[0]) else None
    except ConfigError as e:
        raise ConfigError(f"{where}.arch_layout: {e}") from None
    try:
        mixers = [find(letter, config.mixers) for letter in kinds]
    except ConfigError as e:
        raise ConfigError(f"{where}.arch_layout={reprlib.repr(stage.arch_layout)}: {e}") from None
    if problem := _passes_problem(config, i):
        raise ConfigError(f"{where}.{problem}")
    if own is not None:
        if problem := own.problem(config, stage):
            raise ConfigError(f"{where}.{problem}")
        return
    if inner and not stage.arch_layout[0]:
        raise ConfigError(
            f"{where}.arch_layout=('',): the innermost stage needs layers, such as 'T4'"
        )
    for mixer in mixers:
        if problem := mixer.problem(config, stage.of_one_vector):
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


def _passes_problem(config: Architecture, i: int) -> str | None:
    """One line on passes or vectors that the parts or layers of a stage do not support."""
    stage, *inner = config.stages[i:]
    if stage.vectors > 1:
        if inner:
            return f"vectors={stage.vectors} outside of the innermost stage: use 1"
        if stage.d_model % stage.vectors:
            return f"vectors={stage.vectors} does not divide d_model={stage.d_model}: use a divisor"
        if is_class(layout := stage.arch_layout[0]) or set(layout) - set("tT0123456789"):
            return f"vectors={stage.vectors} with arch_layout={stage.arch_layout!r}: use t, T"
    if stage.passes == 1:
        return None
    if not inner:
        return f"passes={stage.passes} in the innermost stage, which has no chunks: use 1"
    pool: Any = stage.chunking.pool
    if not pool.part.reads_chunk_again:
        return (
            f"passes={stage.passes} with chunking.pool={pool.name!r}, whose vectors cannot read "
            "their chunk again: use 'latents'"
        )
    if len(inner) > 1 or is_class(inner[0].arch_layout[0]):
        return (
            f"passes={stage.passes} around stages that chunk, or a class: use one inner stage of "
            "layers"
        )
    if not reads_memory(stage.arch_layout[1], config.mixers):
        return (
            f"passes={stage.passes} with decoder {stage.arch_layout[1]!r}, which reads no chunk "
            "vectors: use layers x or X in it, such as 'x1T1'"
        )
    dechunk: Any = stage.chunking.dechunk
    width, wanted = stage.cross_attention.memory_width or stage.d_model, inner[0].d_model
    place = Place(i, stage.d_model, wanted, stage.chunking)
    read = dechunk.part.memory_width(dechunk, place)
    if not width * pool.num_queries == read == wanted:
        return (
            f"passes={stage.passes}: the decoder must read what the main network gives, so "
            f"{pool.num_queries} vectors (chunking.pool.num_queries) of {width} channels "
            f"(cross_attention.memory_width) and the {read} channels of chunking.dechunk="
            f"{dechunk.name!r} must be {wanted} channels, stage {i + 1}'s d_model"
        )
    return None


def _memory_problem(config: Architecture, i: int) -> str | None:
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


def _deletion_problem(config: Architecture, i: int) -> str | None:
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


def _levels_problem(config: Architecture, i: int, predictor: Any) -> str | None:
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


def _width_problem(config: Architecture, i: int) -> str | None:
    """One line on chunk vectors that do not fit into the next stage."""
    stage, inner = config.stages[i], config.stages[i + 1]
    chunking = stage.chunking
    place = Place(i, stage.d_model, inner.d_model, chunking)
    pool: Any = chunking.pool
    dechunk: Any = chunking.dechunk
    for at, part in (("pool", pool), ("dechunk", dechunk)):
        if problem := part.problem_at(place):
            return f"{i}.chunking.{at}.{problem}"
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


def _check_size(config: Architecture) -> None:
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


def approximate_parameters(config: Architecture) -> int:
    """Approximate number of parameters: all large matrices, without biases, norms and parts."""
    width = config.stages[0].d_model
    total = config.vocab_size * width + config.embedding.num_parameters(config.vocab_size, width)
    for stage in config.stages:
        D, inner = stage.d_model, config.ssm.expand * stage.d_model
        mixed, heads = inner + 2 * config.ssm.d_state, inner // config.ssm.head_dim
        ssm = D * (2 * inner + mixed + heads) + config.ssm.d_conv * mixed
        layouts = (*stage.arch_layout, *stage.arch_layout[1:] * (stage.passes - 1))
        for kind, count in (run for part in layouts for run in layout_runs(part)):
            mixer = ssm if kind in "mM" else 4 * D * D
            total += count * (mixer + 3 * D * stage.d_mlp * kind.isupper())
        total += 3 * D * D * (len(stage.arch_layout) == 2)
    return total
