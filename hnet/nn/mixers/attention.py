"""The self-attention mixer: projections, rotary positions, attention and its cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.attention import attention_by_queries, cached_attention, share_heads
from hnet.nn.cache import KVCache, ring, write
from hnet.nn.context import Context, StepContext
from hnet.nn.kernels.attention_blocks import attention_blocks
from hnet.nn.kernels.derivatives import rounded
from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.kernels.table import array_block_len, kernel
from hnet.nn.layers import RMSNorm, fused_linear, linear, rotary, segment_positions
from hnet.nn.mixers.base import Mixer
from hnet.nn.parameters import parameter
from hnet.nn.settings import SharedConfig, StackConfig


class Attention(Mixer):
    """The official CausalMHA (fused Wqkv, partial rotary, no biases) and its options."""

    can_look_ahead = takes_key_bias = True

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        D, H, compute = stage.d_model, stage.num_heads, config.compute
        make = partial(linear, dtype=compute.dtype, inputs=compute.inputs, rngs=rngs)
        options = stage.attention
        self.stage, self.compute, self.options, self.causal = stage, config.compute, options, causal
        self.num_kv_heads = options.num_kv_heads or H
        self.kv_width = D // H * self.num_kv_heads
        width = D + 2 * self.kv_width
        self.Wqkv = make(D, width, "embed_fused out")
        self.out_proj = make(D, D, "heads out", std=out_std)
        if options.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)
        if options.sink == "learned":
            self.sink = parameter(jnp.zeros((H,), jnp.float32), "channels", decay=False)

    @staticmethod
    def problem(config, stage):
        if problem := stage.heads_problem():
            return problem
        head_dim = stage.d_model // stage.num_heads
        if stage.rotary_emb_dim % 2 or not 0 <= stage.rotary_emb_dim <= head_dim:
            return (
                f"rotary_emb_dim={stage.rotary_emb_dim}: "
                f"use an even number from 0 to the head width {head_dim}"
            )
        kv_heads = stage.attention.num_kv_heads
        if kv_heads and stage.num_heads % kv_heads:
            return (
                f"attention.num_kv_heads={kv_heads} does not divide num_heads={stage.num_heads}: "
                "use a divisor, or 0 for as many"
            )
        return None

    def qkv(self, x_BLD: jax.Array, positions_BL: jax.Array) -> tuple[jax.Array, ...]:
        """Rotated queries (B, L, H, K) and keys, and values, each split into its heads."""
        B, L, D = x_BLD.shape
        H, dim = self.stage.num_heads, self.stage.rotary_emb_dim
        widths = (D, self.kv_width, self.kv_width)
        cut = None if self.num_kv_heads == H else 1  # parts of other widths are replicated
        parts = fused_linear(self.Wqkv, x_BLD, widths, heads=H, cut=cut)
        q, k, v = (part.reshape(B, L, -1, D // H) for part in parts)
        if self.options.qk_norm:
            q, k = _of_heads(self.q_norm, q), _of_heads(self.k_norm, k)
        turn = partial(rotary, rotary_dim=dim, base=self.options.rotary_base)
        parts = turn(q, positions_BL), turn(k, positions_BL), v
        return tuple(rounded(part, self.compute.inputs) for part in parts)

    def sink_logits(self) -> jax.Array | None:
        """Sink logit of each head's softmax; None without sinks."""
        match self.options.sink:
            case "none":
                return None
            case "one":
                return jnp.zeros((self.stage.num_heads,), jnp.float32)
            case "learned":
                return self.sink[...]
            case other:
                raise ValueError(f"attention.sink={other!r}: use none, one or learned")

    def attend(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """The output, and the keys and values that it used."""
        segment_ids_BL, positions_BL = context.segment_ids_BL, context.positions_BL
        if positions_BL is None:
            positions_BL = segment_positions(segment_ids_BL) // self.stage.vectors
        q, k, v = self.qkv(x_BLD, positions_BL)
        shared = self.stage.num_heads // self.num_kv_heads
        arrays = [q, share_heads(k, shared, axis=2), share_heads(v, shared, axis=2), segment_ids_BL]
        axes, soft_cap = ["BLHK", "BLHK", "BLHK", "BL"], self.options.logit_soft_cap
        block_len = array_block_len("attention_backend", self.compute)
        sink_H, vectors = self.sink_logits(), self.stage.vectors
        has_options = sink_H is not None or soft_cap or vectors > 1
        if context.key_bias_BL is not None or has_options or not self.causal:
            # no kernel of the table supports these options
            attend = partial(
                _with_options, has_bias=context.key_bias_BL is not None, block_len=block_len,
                causal=self.causal, soft_cap=soft_cap, vectors=vectors,
            )  # fmt: skip
            for a, letters in ((context.key_bias_BL, "BL"), (sink_H, "H")):
                if a is not None:
                    arrays.append(a)
                    axes.append(letters)
        else:
            blocked = partial(attention_blocks, block_len=block_len)
            attend = kernel("attention_backend", self.compute) or blocked
        out_BLHK = sharded_over_rows(
            partial(attend, window=self.stage.window_size), tuple(axes), "BLHK", *arrays
        )
        return self.out_proj(out_BLHK.reshape(x_BLD.shape)), k, v

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        return self.attend(x_BLD, context)[0]

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, KVCache]:
        out_BLD, k, v = self.attend(x_BLD, context)
        window, bias = self.stage.window_size, None
        if window >= 0:
            window = self.stage.vectors * (window + 1) - 1
        size = max_len if window < 0 else min(max_len, window + 1)
        if context.key_bias_BL is not None:
            bias = ring(context.key_bias_BL[..., None, None], lengths_B, size)[:, :, 0, :, 0]
        return out_BLD, KVCache(ring(k, lengths_B, size), ring(v, lengths_B, size), bias)

    def step(
        self, x_RVD: jax.Array, cache: KVCache, at: tuple, context: StepContext
    ) -> tuple[jax.Array, KVCache]:
        """One position of R rows, which has V = `vectors` vectors."""
        R, V, _ = x_RVD.shape
        q, k, v = self.qkv(x_RVD, jnp.broadcast_to(context.rotary[:, None], (R, V)))
        key_bias_R, window, first_R = context.key_bias_R, self.stage.window_size, context.first_R
        if (key_bias_R is None) != (cache.bias is None):
            raise ValueError("key biases are given in all of prefill and steps, or in none")
        blocks, T = cache.k.shape[-4], cache.k.shape[-2]
        keys, values, bias = cache
        for i in range(V):  # each vector has a slot of its own
            slot_R = (V * context.positions_R + i) % (blocks * T)
            newest = (*at, slot_R // T, slice(None), slot_R % T)
            keys, values = write(keys, newest, k[:, i]), write(values, newest, v[:, i])
            if bias is not None:
                bias = write(bias, (*at, slot_R // T, slot_R % T), key_bias_R)
        cache = KVCache(keys, values, bias)
        sink_H = self.sink_logits()
        out_RXK = cached_attention(
            q.swapaxes(1, 2).reshape(R, -1, q.shape[-1]), cache, at,
            V * context.positions_R + (V - 1),
            window=window if window < 0 else V * (window + 1) - 1,
            first_R=None if first_R is None else V * first_R,
            sink_H=sink_H if sink_H is None or V == 1 else jnp.repeat(sink_H, V),
            soft_cap=self.options.logit_soft_cap,
        )  # fmt: skip
        out_RVHK = out_RXK.reshape(R, -1, V, out_RXK.shape[-1]).swapaxes(1, 2)
        return self.out_proj(out_RVHK.reshape(x_RVD.shape)), cache


def _with_options(q, k, v, segment_ids_BL, *more, has_bias, **options):
    """`attention_by_queries` with an optional key bias and optional sinks in `more`."""
    key_bias_BL = more[0] if has_bias else None
    sink_H = more[-1] if len(more) > has_bias else None
    return attention_by_queries(q, k, v, segment_ids_BL, key_bias_BL, sink_H, **options)


def _of_heads(norm: RMSNorm, x_BLHK: jax.Array) -> jax.Array:
    B, L, H, K = x_BLHK.shape
    return norm(x_BLHK.reshape(B, L * H, K)).reshape(x_BLHK.shape).astype(x_BLHK.dtype)
