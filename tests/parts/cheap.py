"""A mixer that compiles fast, for tests of other parts, and the settings that they test."""

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.chunking.pools import cross_attention as pools
from hnet.chunking.pools.latents import Latents
from hnet.chunking.predictors.convolved import Hazard
from hnet.chunking.predictors.deletion_gate import DeletionGate
from hnet.chunking.predictors.hat_words import HatWords
from hnet.chunking.table import POOLS
from hnet.nn.cache import read, write
from hnet.nn.context import Context, StepContext
from hnet.nn.layers import linear, segment_starts
from hnet.nn.mixers.base import Mixer
from hnet.parts import Table, settings_of
from hnet.second_model.entropy import Entropy

MOST = 4
"""`max_chunk_len` of parts that need a limit"""
FITTING = {
    "cross_attention pool": pools.CrossAttention.Config(2, 1),
    "latents pool": Latents.Config(2, 1, 3),
}
"""Settings of parts whose defaults do not fit the widths of these tests"""


def settings_for(name: str, table: Table):
    return FITTING.get(f"{name} {table.kind}", None) or settings_of(name, table)


def limit_for(pool) -> int:
    """`max_chunk_len` for a pool: its settings or its name."""
    return MOST if settings_of(pool, POOLS).part in (pools.CrossAttention, Latents) else 0


SETTINGS = {
    "entropy": Entropy.Config(rule="monotonic"), "hazard": Hazard.Config(longest=4),
    "deletion_gate": DeletionGate.Config(soft=False), "hat_words": HatWords.Config(limit=3),
}  # fmt: skip
"""settings of parts whose defaults would not have both boundaries and none with random weights, or
do not fit the layers of these tests"""


class Previous(Mixer):
    """y_t = W x_t + V x_{t-1}, with nothing before the first position of a segment."""

    def __init__(self, config, stage, *, out_std, causal=True, rngs: nnx.Rngs):
        D = stage.d_model
        self.own = linear(D, D, "embed out", dtype="float32", rngs=rngs)
        self.before = linear(D, D, "embed out", dtype="float32", rngs=rngs)

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        starts_BL1 = segment_starts(context.segment_ids_BL)[..., None]
        earlier_BLD = jnp.pad(x_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return self.own(x_BLD) + self.before(jnp.where(starts_BL1, 0.0, earlier_BLD))

    def prefill(self, x_BLD, context, lengths_B, max_len):
        take = jax.vmap(lambda x_LD, n: x_LD.at[n - 1].get(mode="clip"))
        last_BD = jnp.where((lengths_B > 0)[:, None], take(x_BLD, lengths_B), 0.0)
        return self(x_BLD, context), last_BD

    def step(self, x_R1D, cache, at, context: StepContext):
        last_RD = context.carried(read(cache, at))
        return self.own(x_R1D) + self.before(last_RD[:, None]), write(cache, at, x_R1D[:, 0])
