"""The cross-attention mixer: positions read vectors of chunks (`Context.memory`)."""

from functools import partial

import jax
from flax import nnx

from hnet.nn.attention import grouped_attention
from hnet.nn.context import Context, Memory, StepContext
from hnet.nn.layers import RMSNorm, fused_linear, linear
from hnet.nn.mixers.base import Mixer
from hnet.nn.settings import SharedConfig, StackConfig


class CrossAttention(Mixer):
    """Queries from positions, keys and values from normed memory; no rotary positions, no biases.

    As in BLT (arXiv 2412.09871, section 3.3). In a decoder the group of a position is the chunk
    that it reads, i.e. the last one with an output of the main network. There is no cache: a step
    computes the keys of the memory in its context.
    """

    reads_memory = True
    can_look_ahead = takes_key_bias = True  # no other position is seen, only memory

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        D, compute, options = stage.d_model, config.compute, stage.cross_attention
        make = partial(linear, dtype=compute.dtype, inputs=compute.inputs, rngs=rngs)
        self.num_heads, self.options = stage.num_heads, options
        width = options.memory_width or D
        self.Wq = make(D, D, "embed_fused out")
        self.Wkv = make(width, 2 * D, "embed_fused out")
        self.memory_norm = RMSNorm(width)
        self.out_proj = make(D, D, "heads out", std=out_std)

    @staticmethod
    def problem(config, stage):
        if problem := stage.heads_problem():
            return problem
        if stage.cross_attention.window == 0:
            return "cross_attention.window=0: use 1 or more, or -1 for all groups"
        return None

    def attend(self, x_BLD: jax.Array, segment_ids_BL, memory: Memory | None) -> jax.Array:
        if memory is None:
            raise ValueError("layers x and X read a memory: give context.memory")
        D, H = x_BLD.shape[-1], self.num_heads
        G, M, N, width = memory.x_GMND.shape
        (q,) = fused_linear(self.Wq, x_BLD, (D,), heads=H)
        x_GXD = self.memory_norm(memory.x_GMND.reshape(G, M * N, width))
        k, v = (a.reshape(G, M, N, H, -1) for a in fused_linear(self.Wkv, x_GXD, (D, D), heads=H))
        if memory.query_segment_ids_BL is not None:
            segment_ids_BL = memory.query_segment_ids_BL
        if memory.segment_ids_GM is None:
            segment_ids_BL = None
        shared = lambda a: None if a is None else a.reshape(G, -1, *a.shape[2:])
        out_GQHK = grouped_attention(
            shared(q.reshape(*q.shape[:2], H, -1)), k, v, shared(memory.query_group_BL),
            memory.group_GM, shared(segment_ids_BL), memory.segment_ids_GM,
            relation=self.options.relation, window=self.options.window,
        )  # fmt: skip
        return self.out_proj(out_GQHK.reshape(x_BLD.shape))

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        return self.attend(x_BLD, context.segment_ids_BL, context.memory)

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, tuple]:
        return self(x_BLD, context), ()

    def step(
        self, x_R1D: jax.Array, cache: tuple, at: tuple, context: StepContext
    ) -> tuple[jax.Array, tuple]:
        return self.attend(x_R1D, None, context.memory), cache
