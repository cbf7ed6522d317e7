"""Small networks that several tests share, and how tests compile them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import ChunkingConfig, ComputeConfig, HNetConfig, SSMConfig, StageConfig
from hnet.model import abstract

# A fifth of the default's compile time. Where a result must be that of the program people run
# (causality bit for bit, parity), tests use plain `jax.jit`.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick_jit = partial(jax.jit, compiler_options=QUICK)

# blocks shorter than the rows of the tests, so that blocks meet and the last one is ragged
COMPUTE = ComputeConfig(ssd_block_len=8, attention_block_len=11)


def stage(layouts: str, width: int, *, window: int = -1, ratio: float = 3.0) -> StageConfig:
    """`layouts`: "encoder decoder" or one stack. Heads of 13 channels, 6 of them rotated."""
    chunking = ChunkingConfig(target_ratio=ratio)
    return StageConfig(tuple(layouts.split()), width, 61, width // 13, 6, window, chunking)


def network(*stages: StageConfig, **fields) -> HNetConfig:
    return HNetConfig(stages, ssm=SSMConfig(d_state=7, head_dim=13), compute=COMPUTE, **fields)


NETWORKS = {
    "one_stage": network(stage("m2 m1T1", 26, window=5), stage("T2", 39)),
    "two_stage": network(
        stage("m1 T1", 26), stage("t1 m1", 39, window=3, ratio=2.0), stage("M1", 39)
    ),
    "three_stage": network(
        stage("t1 m1", 26, window=7), stage("m1 t1", 26, window=0), stage("t1 t1", 39),
        stage("m1", 52),
    ),
    "tied": network(stage("t1 t1", 26), stage("t1", 26, window=2), tie_embeddings=True),
    "iso_T": network(stage("T2", 26, window=7)),
    "iso_m": network(stage("m1M1", 26)),
}  # fmt: skip


def random_params(config: HNetConfig, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """(structure, parameters) with nothing left at an initial zero, one or identity."""
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

    graph, shapes = abstract(config)
    return graph, jax.tree_util.tree_map_with_path(draw, shapes)


def with_compute(config: HNetConfig, **fields) -> HNetConfig:
    return replace(config, compute=replace(config.compute, **fields))
