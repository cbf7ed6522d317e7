"""The mLSTM mixer of xLSTM (arXiv 2405.04517; block of arXiv 2503.13427): `hnet.nn.mlstm`.

Axes here: H heads, K key channels, V value channels, C channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.nn.cache import last_positions, read, write
from hnet.nn.context import Context, StepContext
from hnet.nn.kernels.derivatives import rms_norm
from hnet.nn.kernels.sharded import sharded_over_rows
from hnet.nn.layers import fused_linear, linear
from hnet.nn.mixers.base import Mixer
from hnet.nn.mlstm import NEVER, MLSTMState, mlstm, mlstm_step
from hnet.nn.parameters import parameter
from hnet.nn.settings import SharedConfig, StackConfig


class MLSTM(Mixer):
    """Figure 2 of arXiv 2503.13427: capped gates, layer norm of each head, sigmoid output gate."""

    def __init__(
        self, config: SharedConfig, stage: StackConfig, *, out_std: float, causal: bool = True,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        D, compute, options = stage.d_model, config.compute, stage.mlstm
        make = partial(linear, dtype=compute.dtype, inputs=compute.inputs, rngs=rngs)
        self.block_len = config.compute.delta_block_len
        self.num_heads = H = options.num_heads or stage.num_heads
        self.soft_cap = options.gate_soft_cap
        values = D if options.value_dim == 0 else options.value_dim * H
        keys = (options.key_dim or max(values // H // 2, 1)) * H
        self.widths = keys, values
        self.qk_proj = make(D, 2 * keys, "embed_fused out")
        self.vo_proj = make(D, 2 * values, "embed_fused out")
        self.gate_proj = make(D, 2 * H, "embed out")
        input_H = np.full((H,), options.input_gate_bias, np.float32)
        forget_H = np.linspace(3, 6, H, dtype=np.float32)
        self.gate_bias = parameter(
            jnp.asarray(np.concatenate([input_H, forget_H])), "channels", decay=False
        )
        self.norm_scale = parameter(jnp.ones((values,), jnp.float32), "channels", decay=False)
        self.out_proj = make(values, D, "inner out", std=out_std)

    @staticmethod
    def problem(config, stage):
        options = stage.mlstm
        heads = options.num_heads or stage.num_heads
        if heads < 1 or (options.value_dim == 0 and stage.d_model % heads):
            return (
                f"d_model={stage.d_model} is not divided by the {heads} heads of layers l: "
                "give mlstm.value_dim, or another mlstm.num_heads"
            )
        return None

    def inputs(self, x_BLD: jax.Array) -> tuple[tuple, jax.Array]:
        """((q, k, v, igate_BLH, fgate_BLH), preactivation of the output gate)."""
        (keys, values), H = self.widths, self.num_heads
        q, k = fused_linear(self.qk_proj, x_BLD, (keys, keys), heads=H)
        v, gate_BLC = fused_linear(self.vo_proj, x_BLD, (values, values), heads=H)
        q, k, v = (a.reshape(*a.shape[:2], H, -1) for a in (q, k, v))
        gates = self.gate_proj(x_BLD).astype(jnp.float32) + self.gate_bias[...][None, None]
        if self.soft_cap:
            gates = self.soft_cap * jnp.tanh(gates / self.soft_cap)
        return (q, k, v, *jnp.split(gates, 2, axis=-1)), gate_BLC

    def finish(self, y_BLHV: jax.Array, gate_BLC: jax.Array) -> jax.Array:
        (B, L, H, V), scale = y_BLHV.shape, self.norm_scale[...]
        y_BLHV = y_BLHV - jnp.mean(y_BLHV, axis=-1, keepdims=True)
        normed = rms_norm(y_BLHV.reshape(B, L * H, V), jnp.ones((V,), jnp.float32))
        normed = normed.reshape(gate_BLC.shape) * scale[None, None]
        return self.out_proj(normed * jax.nn.sigmoid(gate_BLC.astype(jnp.float32)))

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        arrays, gate_BLC = self.inputs(x_BLD)
        run = lambda *arrays: mlstm(*arrays, block_len=self.block_len)[0]
        axes = ("BLHK", "BLHK", "BLHV", "BLH", "BLH", "BL")
        y_BLHV = sharded_over_rows(run, axes, "BLHV", *arrays, context.segment_ids_BL)
        return self.finish(y_BLHV, gate_BLC)

    def prefill(
        self, x_BLD: jax.Array, context: Context, lengths_B: jax.Array, max_len: int
    ) -> tuple[jax.Array, MLSTMState]:
        segment_ids_BL = context.segment_ids_BL
        (q, k, v, igate_BLH, fgate_BLH), gate_BLC = self.inputs(x_BLD)
        # Positions after a row's end continue its last segment and do not change the state.
        index_L = jnp.arange(x_BLD.shape[1], dtype=jnp.int32)
        is_after_BL = index_L[None] >= lengths_B[:, None]
        ids_BL = jnp.where(
            is_after_BL, last_positions(segment_ids_BL, lengths_B, 1), segment_ids_BL
        )
        igate_BLH = jnp.where(is_after_BL[..., None], NEVER, igate_BLH)
        fgate_BLH = jnp.where(is_after_BL[..., None], -NEVER, fgate_BLH)
        y, state = mlstm(q, k, v, igate_BLH, fgate_BLH, ids_BL, block_len=self.block_len)
        return self.finish(y, gate_BLC), state

    def step(
        self, x_R1D: jax.Array, cache: MLSTMState, at: tuple, context: StepContext
    ) -> tuple[jax.Array, MLSTMState]:
        arrays, gate_R1C = self.inputs(x_R1D)
        state = MLSTMState(*(context.carried(read(a, at)) for a in cache))
        y_RHV, state = mlstm_step(*(a[:, 0].astype(jnp.float32) for a in arrays), state)
        cache = MLSTMState(*(write(a, at, new) for a, new in zip(cache, state)))
        return self.finish(y_RHV[:, None], gate_R1C), cache
