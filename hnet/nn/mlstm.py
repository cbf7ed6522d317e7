"""The mLSTM recurrence (arXiv 2405.04517, 2503.13427), one position at a time and in blocks.

Axes here: H heads, K key channels, V value channels, T positions per block, N blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hnet.nn.decays import log_decays
from hnet.nn.ssd import matmul_in, segment_marks

EPS = 1e-6  # added to the denominator (NX-AI/mlstm_kernels)
NEVER = -1e30  # input gate of a position that writes nothing; finite, so that differences are

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class MLSTMState(NamedTuple):
    """State after a position, divided by exp(max)."""

    memory_BHKW: jax.Array
    """sums of k v' and, in the last column, of k; W = V + 1"""
    max_BH: jax.Array
    """logarithm of the largest weight in the sums, for a stable exp"""


def zero_state(rows: int, heads: int, K: int, V: int) -> MLSTMState:
    """State before the first position of a segment."""
    return MLSTMState(
        jnp.zeros((rows, heads, K, V + 1), jnp.float32), jnp.zeros((rows, heads), jnp.float32)
    )


def mlstm_step(q_RHK, k_RHK, v_RHV, igate_RH, fgate_RH, state: MLSTMState):
    """The recurrence for one position of R rows: (y_RHV, next state), all float32.

    C_t = f C_{t-1} + i k v',  n_t = f n_{t-1} + i k,  y = C' q / max(|n' q|, 1),  with q / sqrt(K),
    f = sigmoid(fgate), i = exp(igate) (arXiv 2405.04517, eq. 19 to 27). Sums are divided by exp(m),
    m = max(log f + m, igate).
    """
    log_f_RH = jax.nn.log_sigmoid(fgate_RH)
    max_RH = jax.lax.stop_gradient(jnp.maximum(log_f_RH + state.max_BH, igate_RH))
    keep_RH, write_RH = jnp.exp(log_f_RH + state.max_BH - max_RH), jnp.exp(igate_RH - max_RH)
    written_RHKW = (write_RH[..., None] * k_RHK)[..., None] * _with_one(v_RHV)[..., None, :]
    memory_RHKW = keep_RH[..., None, None] * state.memory_BHKW + written_RHKW
    sums_RHW = _einsum("rhkw,rhk->rhw", memory_RHKW, q_RHK * q_RHK.shape[-1] ** -0.5)
    return _divided(sums_RHW, max_RH), MLSTMState(memory_RHKW, max_RH)


def mlstm(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    igate_BLH: jax.Array,
    fgate_BLH: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    block_len: int,
) -> tuple[jax.Array, MLSTMState]:
    """`mlstm_step` for whole rows: attention with decaying weights inside a block, a scan over
    blocks carries the state (arXiv 2503.14376).

    Equal neighbours in `segment_ids_BL` are one segment; segments are independent. Gates, maxima
    and states are float32; operands of other matmuls have the dtype of `q_BLHK`. Returns float32
    (y_BLHV, state after the last position). The state is not divided by the maximum of the whole
    row, but y does not depend on m, except for the small EPS.
    """
    B, L, H, K = q_BLHK.shape
    T, einsum = min(block_len, L), partial(matmul_in, dtype=q_BLHK.dtype)

    def blocks(a, fill=0.0):  # (B, L, H, ...) -> (N, B, H, T, ...)
        padding = ((0, 0), (0, -L % T)) + ((0, 0),) * (a.ndim - 2)
        a = jnp.pad(a.astype(jnp.float32), padding, constant_values=fill)
        return jnp.moveaxis(a.reshape(B, -1, T, *a.shape[2:]), (1, 3), (0, 2))

    q, k, v = blocks(q_BLHK * K**-0.5), blocks(k_BLHK), blocks(_with_one(v_BLHV))
    igate_NBHT = blocks(igate_BLH, NEVER)
    log_f_BNHT = blocks(jax.nn.log_sigmoid(fgate_BLH)).swapaxes(0, 1)
    # Padding continues the last segment, so the final state is that before the padding.
    ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, -L % T)), mode="edge")
    decays = log_decays(log_f_BNHT, segment_marks(ids_BL.reshape(B, -1, T)))
    within, to_end, from_start, carry = (a.swapaxes(0, 1) for a in decays)
    own_NBHTT, end_NBHT = within + igate_NBHT[..., None, :], to_end + igate_NBHT

    def one_block(state, block):
        q, k, v, own_BHTT, end_BHT, start_BHT, carry_BH = block
        before_BHT = start_BHT + state.max_BH[..., None]
        max_BHT = jnp.maximum(jnp.max(own_BHTT, axis=-1), before_BHT)
        max_BHT = jax.lax.stop_gradient(max_BHT)
        weights_BHTT = jnp.exp(own_BHTT - max_BHT[..., None])
        scores_BHTT = einsum("bhik,bhjk->bhij", q, k) * weights_BHTT
        reads = einsum("bhtk,bhkw->bhtw", q, state.memory_BHKW)
        sums_BHTW = einsum("bhij,bhjw->bhiw", scores_BHTT, v)
        sums_BHTW = sums_BHTW + jnp.exp(before_BHT - max_BHT)[..., None] * reads
        kept_BH = carry_BH + state.max_BH
        last_BH = jax.lax.stop_gradient(jnp.maximum(jnp.max(end_BHT, axis=-1), kept_BH))
        written = jnp.exp(end_BHT - last_BH[..., None])[..., None] * k
        memory_BHKW = jnp.exp(kept_BH - last_BH)[..., None, None] * state.memory_BHKW
        memory_BHKW = memory_BHKW + einsum("bhtk,bhtw->bhkw", written, v)
        return MLSTMState(memory_BHKW, last_BH), _divided(sums_BHTW, max_BHT)

    first = zero_state(B, H, K, v_BLHV.shape[-1])
    parts = (q, k, v, own_NBHTT, end_NBHT, from_start, carry)
    state, y_NBHTV = jax.lax.scan(one_block, first, parts)
    y_BNTHV = y_NBHTV.transpose(1, 0, 3, 2, 4)
    return y_BNTHV.reshape(B, -1, *v_BLHV.shape[2:])[:, :L], state


def _with_one(v_XV: jax.Array) -> jax.Array:
    """Values with a last channel of 1, whose sum is the denominator."""
    return jnp.concatenate([v_XV, jnp.ones_like(v_XV[..., :1])], axis=-1)


def _divided(sums_XW: jax.Array, max_X: jax.Array) -> jax.Array:
    """Sums of values over max(|sum of weights|, 1), all divided by exp(max)."""
    below_X = jnp.maximum(jnp.abs(sums_XW[..., -1]), jnp.exp(-max_X)) + EPS
    return sums_XW[..., :-1] / below_X[..., None]
