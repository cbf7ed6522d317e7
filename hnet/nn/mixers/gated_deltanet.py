"""The gated DeltaNet mixer (arXiv 2412.06464): projections, short convolutions, `hnet.nn.delta`.

Axes here: H heads, K key channels, V value channels, C channels, W taps.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hnet.nn.cache import RecurrentCache, in_last_segment, last_positions, read, write
from hnet.nn.context import Context, StepContext
from hnet.nn.delta import gated_delta, gated_delta_step
from hnet.nn.kernels.convolution import causal_conv_silu, conv_silu_step
from hnet.nn.kernels.derivatives import gated, rms_norm
from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.layers import RMSNorm, fused_linear, linear, replicate
from hnet.nn.mixers.base import Mixer
from hnet.nn.mixers.mamba2 import init_dt_bias
from hnet.nn.parameters import parameter
from hnet.nn.settings import SharedConfig, StackConfig


class GatedDeltaNet(Mixer):
    """Figure 1 of the paper: convolved q, k, v; L2-normed q and k; gated norm of each head.

    Queries are divided by sqrt(K), as in the authors' code. The norm of the output removes this
    factor, except for the norm's epsilon.
    """

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        D, compute, options, key = stage.d_model, config.compute, stage.delta, rngs.params
        make = partial(linear, dtype=compute.dtype, inputs=compute.inputs, rngs=rngs)
        self.block_len = config.compute.delta_block_len
        self.num_heads = H = options.num_heads or stage.num_heads
        head_dim = options.head_dim or D // H
        self.widths = head_dim * H, options.expand_v * head_dim * H  # widths of keys and values
        keys, values = self.widths
        self.qk_proj = make(D, 2 * keys, "embed_fused out")
        self.vg_proj = make(D, 2 * values, "embed_fused out")
        self.ab_proj = make(D, 2 * H, "embed out")
        bound = options.d_conv**-0.5  # as in Mamba-2
        weight_WC = jax.random.uniform(
            key(), (options.d_conv, 2 * keys + values), jnp.float32, -bound, bound
        )
        self.conv1d_weight = parameter(weight_WC, "taps channels")
        A_H = jax.random.uniform(key(), (H,), jnp.float32, 1.0, 16.0)
        self.A_log = parameter(jnp.log(A_H), "channels", decay=False)
        self.dt_bias = parameter(init_dt_bias(key(), H), "channels", decay=False)
        self.norm = RMSNorm(values // H)
        self.out_proj = make(values, D, "inner out", std=out_std)

    @staticmethod
    def problem(config, stage):
        options = stage.delta
        heads = options.num_heads or stage.num_heads
        if heads < 1 or (options.head_dim == 0 and stage.d_model % heads):
            return (
                f"d_model={stage.d_model} is not divided by the {heads} heads of layers g: "
                "give delta.head_dim, or another delta.num_heads"
            )
        return None

    def project(self, x_BLD: jax.Array) -> tuple[list[jax.Array], jax.Array, tuple]:
        """q, k and v before the convolution, the output gate, and (log_alpha_BLH, beta_BLH)."""
        (keys, values), H = self.widths, self.num_heads
        q, k = fused_linear(self.qk_proj, x_BLD, (keys, keys), heads=H)
        v, gate = fused_linear(self.vg_proj, x_BLD, (values, values), heads=H)
        a_BLH, b_BLH = jnp.split(self.ab_proj(x_BLD).astype(jnp.float32), 2, axis=-1)
        dt_BLH = jax.nn.softplus(a_BLH + self.dt_bias[...][None, None])
        log_alpha_BLH = -jnp.exp(self.A_log[...])[None, None] * dt_BLH
        return [q, k, v], gate, (log_alpha_BLH, jax.nn.sigmoid(b_BLH))

    def conv_weights(self, dtype) -> list[jax.Array]:
        keys, _ = self.widths
        weight_WC = replicate(self.conv1d_weight[...]).astype(dtype)
        return jnp.split(weight_WC, [keys, 2 * keys], axis=-1)

    def heads(self, q, k, v) -> tuple[jax.Array, ...]:
        """Convolved q, k and v split into heads; q and k L2-normed."""
        q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in (q, k, v))
        return _unit(q, q.shape[-1] ** -0.5), _unit(k), v

    def finish(self, y_BLHV: jax.Array, gate_BLC: jax.Array) -> jax.Array:
        B, L, H, V = y_BLHV.shape
        normed = rms_norm(y_BLHV.reshape(B, L * H, V), self.norm.scale[...])
        return self.out_proj(gated(normed.reshape(gate_BLC.shape), gate_BLC.astype(jnp.float32)))

    def inputs(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> tuple:
        """(q, k and v before the convolution, gate, inputs of `gated_delta`)."""
        before, gate, rates = self.project(x_BLD)
        weights = self.conv_weights(gate.dtype)
        convolved = (
            causal_conv_silu(a, w, jnp.zeros(a.shape[-1:], a.dtype), segment_ids_BL)
            for a, w in zip(before, weights)
        )
        return before, gate, (*self.heads(*convolved), *rates)

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        _, gate, arrays = self.inputs(x_BLD, context.segment_ids_BL)
        run = lambda *arrays: gated_delta(*arrays, block_len=self.block_len)[0]
        axes = ("BLHK", "BLHK", "BLHV", "BLH", "BLH", "BL")
        return self.finish(
            sharded_over_rows(run, axes, "BLHV", *arrays, context.segment_ids_BL), gate
        )

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, RecurrentCache]:
        segment_ids_BL = context.segment_ids_BL
        before, gate, (q, k, v, log_alpha_BLH, beta_BLH) = self.inputs(x_BLD, segment_ids_BL)
        last_BL1 = in_last_segment(segment_ids_BL, lengths_B)[..., None]
        # Positions after a row's end continue its last segment and do not change the state.
        index_L = jnp.arange(x_BLD.shape[1], dtype=jnp.int32)
        is_after_BL = index_L[None] >= lengths_B[:, None]
        last_B1 = last_positions(segment_ids_BL, lengths_B, 1)
        ids_BL = jnp.where(is_after_BL, last_B1, segment_ids_BL)
        log_alpha_BLH, beta_BLH = (
            jnp.where(is_after_BL[..., None], 0.0, a) for a in (log_alpha_BLH, beta_BLH)
        )
        y, state = gated_delta(q, k, v, log_alpha_BLH, beta_BLH, ids_BL, block_len=self.block_len)
        taps = len(self.conv1d_weight[...]) - 1
        conv = [last_positions(jnp.where(last_BL1, a, 0), lengths_B, taps) for a in before]
        return self.finish(y, gate), RecurrentCache(jnp.concatenate(conv, axis=-1), state)

    def step(
        self, x_R1D: jax.Array, cache: RecurrentCache, at: tuple, context: StepContext
    ) -> tuple[jax.Array, RecurrentCache]:
        before, gate, rates = self.project(x_R1D)
        keys, _ = self.widths
        inputs = jnp.concatenate(before, axis=-1)
        weight_WC = jnp.concatenate(self.conv_weights(gate.dtype), axis=-1)
        taps_RWC = jnp.concatenate([context.carried(read(cache.conv, at)), inputs], axis=1)
        convolved = conv_silu_step(taps_RWC, weight_WC, jnp.zeros_like(weight_WC[0]))
        cut = jnp.split(convolved, [keys, 2 * keys], axis=-1)
        arrays = (*self.heads(*cut), *rates)
        y_RHV, state_RHKV = gated_delta_step(
            *(a[:, 0].astype(jnp.float32) for a in arrays), context.carried(read(cache.state, at))
        )
        conv, state = write(cache.conv, at, taps_RWC[:, 1:]), write(cache.state, at, state_RHKV)
        return self.finish(y_RHV[:, None], gate), RecurrentCache(conv, state)


def _unit(x_BLHK: jax.Array, length: float = 1.0) -> jax.Array:
    """x scaled to vectors of this L2 norm, in the dtype of x."""
    x32 = x_BLHK.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * (length * jax.lax.rsqrt(squares + 1e-6))).astype(x_BLHK.dtype)
