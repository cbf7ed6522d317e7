"""Small networks shared by several tests, and how tests compile them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.chunking.dechunks import prefix as dechunks
from hnet.chunking.dechunks.cross_attention import CrossAttention
from hnet.chunking.dechunks.indexed import Indexed
from hnet.chunking.pools.concat import Concat
from hnet.chunking.pools.latents import Latents
from hnet.chunking.pools.prefix import Prefix
from hnet.config import (
    ChunkingConfig,
    ComputeConfig,
    CrossAttentionConfig,
    HNetConfig,
    SSMConfig,
    StageConfig,
)
from hnet.model import abstract
from hnet.nn.embeddings.hash_ngrams import HashNgrams
from tests.quick import OPTIMIZED, QUICK

quick_jit = partial(jax.jit, compiler_options=QUICK)
optimized_jit = partial(jax.jit, compiler_options=OPTIMIZED)  # as users compile

# blocks shorter than the rows of the tests, so that there are several and the last one is ragged
COMPUTE = ComputeConfig(ssd_block_len=8, attention_block_len=19)


def stage(
    layouts: str, width: int, *, window: int = -1, passes: int = 1, vectors: int = 1,
    memory_width: int = 0, **chunking,
) -> StageConfig:  # fmt: skip
    """`layouts`: "encoder decoder" or one stack; "-" is an empty one. Heads of 13 channels, 6 of
    them rotated."""
    chunking = ChunkingConfig(**{"target_ratio": 3.0, **chunking})
    layouts = tuple(layout.replace("-", "") for layout in layouts.split())
    memory = CrossAttentionConfig(memory_width=memory_width)
    heads = width // vectors // 13
    return StageConfig(
        layouts, width, 61, heads, 6, window, chunking, cross_attention=memory, passes=passes,
        vectors=vectors,
    )  # fmt: skip


def network(*stages: StageConfig, **fields) -> HNetConfig:
    return HNetConfig(stages, ssm=SSMConfig(d_state=7, head_dim=13), compute=COMPUTE, **fields)


def official_network(*parts, **fields):
    """Stages of (width, layouts); heads of the mixers are 64 wide, as in all official ones."""
    stages = tuple(
        StageConfig(tuple(layouts.split()), width, 61, 4, 6, 5) for width, layouts in parts
    )
    return HNetConfig(stages, ssm=SSMConfig(d_state=7), **fields)


MLP_END = {"predictor": "mlp", "alignment": "end", "pool": "mean", "losses": ("binomial",)}
LEVELS = {
    "alignment": "end", "null": "first", "pool": "linear", "dechunk": "indexed", "residual": "add"
}  # fmt: skip
PATCHES = {
    "predictor": "fixed", "alignment": "end", "null": "first", "pool": Concat.Config(3),
    "dechunk": Indexed.Config(3, shared=False, bias=True), "residual": "add",
    "decoder_scope": "chunk",
}  # fmt: skip

# Networks tested by tests/test_battery.py: one line adds a new way to chunk.
NETWORKS = {
    "iso": network(stage("m1T2", 26, window=7)),
    "one_stage": network(stage("m2 m1T1", 26, window=5), stage("T2", 39)),
    "two_stage": network(
        stage("m1 T1", 26), stage("t1 m1", 39, window=3, target_ratio=2.0), stage("M1", 39)
    ),
    "three_stage": network(
        stage("t1 m1", 26, window=0),
        stage("t1 t1", 26, predictor="fixed", alignment="end", target_ratio=2.0),
        stage("t1 t1", 39), stage("m1", 52),
    ),
    "pooled_ends": network(
        stage("t1 t1", 26, **MLP_END, dechunk="repeat", residual="add"), stage("t1", 39)
    ),
    "spacelike_tied": network(
        stage("t1 t1", 26, predictor="spacelike", dechunk="at_boundaries", residual="add"),
        stage("t1", 39), tie_embeddings=True,
    ),
    "routed": network(
        stage("t1 t1", 26, routes=2, hold_rate=True), stage("t1 t1", 26, routes=2, **MLP_END),
        stage("t1", 26),
    ),
    "levels": network(
        stage("t1 t1", 26, **LEVELS, predictor="words"),
        stage("t1 t1", 39, **LEVELS, predictor="levels"), stage("t1", 52),
    ),
    "patches": network(
        stage("t1 t1", 26, **PATCHES),
        replace(stage("t1", 39, **PATCHES), arch_layout=("", "t1")), stage("t1", 52),
    ),
    "prefix": network(
        stage("t1 m1", 26, predictor="whitespace", alignment="end", null="first", residual="add",
              pool=Prefix.Config(2, 3), dechunk=dechunks.Prefix.Config(3),
              decoder_scope="chunk", max_chunk_len=5),
        stage("t1", 39),
    ),
    "passes": network(
        stage("m1 x1m1", 26, predictor="fixed", residual="add", pool=Latents.Config(3, 1, 4),
              dechunk=CrossAttention.Config(3, projection=False, width=13), encoder_scope="chunk",
              decoder_scope="chunk", max_chunk_len=4, passes=2, memory_width=13),
        stage("T1", 39, vectors=3),
    ),
    "hat_words": network(
        stage("t1 t1", 26, predictor="hat_words", residual="add", decoder_scope="chunk",
              pool=Prefix.Config(1, 4, d_intermediate=30), max_chunk_len=5,
              dechunk=Indexed.Config(at_boundaries=True)),
        stage("t1", 39),
    ),
    "routed_offsets": network(  # one predictor, held at the rate of each route
        stage("t1 t1", 26, routes=2, routed_parameters=False, hold_rate=True, **MLP_END),
        stage("t1", 26), embedding=HashNgrams.Config((2, 3), rows=53),
    ),
}  # fmt: skip


def covering(choices: dict[str, set]) -> list[str]:
    """Few of the names, so that each choice that one has occurs in one."""
    missing, taken = set().union(*choices.values()), []
    while missing:
        taken.append(max(choices, key=lambda name: len(choices[name] & missing)))
        missing -= choices[taken[-1]]
    return taken


def random_params(config: HNetConfig, seed: int = 3) -> tuple[nnx.GraphDef, dict]:
    """(structure, parameters) with nothing left at an initial zero, one or identity.

    With the default seed every learned router has boundaries at about half of random bytes.
    """
    graph, shapes = abstract(config)
    return graph, drawn(shapes, seed)


def drawn(shapes: dict, seed: int) -> dict:
    """Random parameters of these shapes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name == "kernel":
            noise /= np.sqrt(leaf.shape[-2])
        elif name in ("scale", "D"):
            noise = 1 + 0.2 * noise
        elif name == "A_log":
            noise = np.log(rng.uniform(1, 16, leaf.shape))
        elif name == "dt_bias":
            noise = rng.uniform(-4, 1, leaf.shape)
        elif name != "embedding":
            noise *= 0.3
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def with_compute(config: HNetConfig, **fields) -> HNetConfig:
    return replace(config, compute=replace(config.compute, **fields))
