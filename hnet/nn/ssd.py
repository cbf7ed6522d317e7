"""The SSD recurrence of Mamba-2 (arXiv 2405.21060) as it is defined, and masks of its blocks.

Axes here: H heads, P channels per head, N state size, T positions per block, K blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def ssd_reference(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, segment_ids_BL) -> jax.Array:
    """The recurrence itself, one position at a time (arXiv 2405.21060, eq. 1 and 16):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t',  y_t = h_t C_t,  h reset at each segment start.
    Returns y_BLHP in float32. Slow: the reference for `ssd_blocks` and the kernels.
    """

    def one_row(x_LHP, dt_LH, B_LN, C_LN, segment_ids_L):
        def step(carry, inputs):
            state_HPN, previous = carry
            x_HP, dt_H, B_N, C_N, segment = inputs
            state_HPN = jnp.where(segment == previous, state_HPN, 0.0)
            decay_H11 = jnp.exp(dt_H * A_H)[:, None, None]
            update_HPN = (dt_H[:, None] * x_HP)[:, :, None] * B_N[None, None, :]
            state_HPN = decay_H11 * state_HPN + update_HPN
            return (state_HPN, segment), state_HPN @ C_N

        zero = jnp.zeros((*x_LHP.shape[1:], B_LN.shape[-1]), jnp.float32)
        inputs = (x_LHP, dt_LH, B_LN, C_LN, segment_ids_L)
        return jax.lax.scan(step, (zero, segment_ids_L[0]), inputs)[1]

    return jax.vmap(one_row)(x_BLHP, dt_BLH, B_BLN, C_BLN, segment_ids_BL)


class SegmentMarks(NamedTuple):
    """Masks of the decays of a block of T positions that cross no segment boundary."""

    log_same_BKTT: jax.Array
    """log mask: 0 if both positions are in one segment, else -inf"""
    to_end_BKT: jax.Array
    """whether the position is in the segment of the block's last position"""
    reaches_BKT: jax.Array
    """whether the position's segment began in an earlier block"""
    stays_BK: jax.Array
    """whether the last position of the block before is in the segment of this block's last
    position"""


def segment_marks(segment_ids_BKT: jax.Array) -> SegmentMarks:
    last_BK = segment_ids_BKT[:, :, -1]
    before_BK = jnp.pad(last_BK[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    same_BKTT = segment_ids_BKT[..., :, None] == segment_ids_BKT[..., None, :]
    return SegmentMarks(
        jnp.log(same_BKTT.astype(jnp.float32)),
        segment_ids_BKT == last_BK[..., None],
        segment_ids_BKT == before_BK[..., None],
        last_BK == before_BK,
    )


def matmul_in(spec: str, *operands: jax.Array, dtype) -> jax.Array:
    cast = [a.astype(dtype) for a in operands]
    return jnp.einsum(spec, *cast, preferred_element_type=jnp.float32)


def ssd_final_state(x_BLHP, dt_BLH, A_H, B_BLN) -> jax.Array:
    """Final h of rows with one segment: sum_t exp(sum_{r>t} dt_r A) dt_t x_t B_t'.

    A position with dt = 0 (padding) does not change the state. Returns (B, H, P, N) in float32.
    """
    log_a_BLH = dt_BLH * A_H[None, None, :]
    after_BLH = jnp.pad(log_a_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    to_end_BLH = jnp.exp(jax.lax.cumsum(after_BLH, axis=1, reverse=True))
    x_end = x_BLHP.astype(jnp.float32) * (dt_BLH * to_end_BLH)[..., None]
    return jnp.einsum("blhp,bln->bhpn", x_end, B_BLN.astype(jnp.float32))
