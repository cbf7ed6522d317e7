"""The official dechunk: an exponential moving average over chunks, weighted by confidence."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hnet.chunking.dechunks.repeat import Repeat, repeated
from hnet.chunking.ema import ema
from hnet.chunking.part import DechunkConfig
from hnet.chunking.slots import Slots

MIN_PROB = 1e-4  # the EMA clips P to [MIN_PROB, 1 - MIN_PROB], so P = 1 keeps some of the past


def confidence(selected_prob: jax.Array) -> jax.Array:
    """1 in the forward pass, the gradient of c in the backward pass (arXiv 2507.07955, eq. 7)."""
    return 1 + (selected_prob - jax.lax.stop_gradient(selected_prob))


class EMA(Repeat):
    """z_m = P_m y_m + (1 - P_m) z_{m-1}, and position t reads z_{slot(t)} * STE(c_t).

    P is clipped to [1e-4, 1 - 1e-4] (arXiv 2507.07955, eq. 5 to 9; goombalab/hnet).
    """

    @dataclass(frozen=True)
    class Config(DechunkConfig):
        """Smoothing by confidence, then repeat (H-Net)."""

    def write(self, z_RD, y_RD, prob_R, config):
        gate_R1 = jnp.clip(prob_R, MIN_PROB, 1 - MIN_PROB)[:, None]
        return gate_R1 * y_RD.astype(jnp.float32) + (1 - gate_R1) * z_RD

    def smoothed(self, y_BMD: jax.Array, slots: Slots) -> jax.Array:
        """z of every slot, float32 (B, M, D)."""
        gate_BM = jnp.clip(slots.boundary_prob_BM, MIN_PROB, 1 - MIN_PROB)
        segment_ids_BM = slots.context.segment_ids_BL
        gate_BM = jnp.where(segment_ids_BM != 0, gate_BM, 0.0)
        return ema(y_BMD.astype(jnp.float32), gate_BM, segment_ids_BM)

    def __call__(self, y_BMD, boundaries, slots, config):
        out_BLD = repeated(self.smoothed(y_BMD, slots), boundaries, slots)
        # For one long row XLA's CPU backend is slow at the sum over channels (gradient of c).
        out_XD = out_BLD.reshape(-1, out_BLD.shape[-1])
        c_X1 = boundaries.selected_prob_BL.reshape(-1, 1)
        return (out_XD * confidence(c_X1)).reshape(out_BLD.shape)

    def after(self, y_BMD, boundaries, slots, config):
        return super().after(self.smoothed(y_BMD, slots), boundaries, slots, config)
