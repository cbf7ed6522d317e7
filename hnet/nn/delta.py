"""The gated delta rule (arXiv 2412.06464), one position at a time and as block matmuls.

Axes here: H heads, K key channels, V value channels, T positions per block, N blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hnet.nn.decays import log_decays
from hnet.nn.ssd import SegmentMarks, matmul_in, segment_marks

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def gated_delta_reference(
    q_BLHK, k_BLHK, v_BLHV, log_alpha_BLH, beta_BLH, segment_ids_BL
) -> jax.Array:
    """The recurrence (arXiv 2412.06464, eq. 10), with its state transposed, one position at a time:

    h_t = alpha_t (I - beta_t k_t k_t') h_{t-1} + beta_t k_t v_t',  y_t = h_t' q_t,  h reset at each
    segment start. Returns y_BLHV in float32. Slow: the reference for `gated_delta`.
    """

    def one_row(q_LHK, k_LHK, v_LHV, log_alpha_LH, beta_LH, segment_ids_L):
        def step(carry, inputs):
            state_HKV, previous = carry
            *now, segment = inputs
            state_HKV = jnp.where(segment == previous, state_HKV, 0.0)
            y_HV, state_HKV = gated_delta_step(*(a[None] for a in now), state_HKV[None])
            return (state_HKV[0], segment), y_HV[0]

        zero = jnp.zeros((*k_LHK.shape[1:], v_LHV.shape[-1]), jnp.float32)
        inputs = (q_LHK, k_LHK, v_LHV, log_alpha_LH, beta_LH, segment_ids_L)
        return jax.lax.scan(step, (zero, segment_ids_L[0]), inputs)[1]

    arrays = (q_BLHK, k_BLHK, v_BLHV, log_alpha_BLH, beta_BLH, segment_ids_BL)
    return jax.vmap(one_row)(*arrays)


def gated_delta_step(q_RHK, k_RHK, v_RHV, log_alpha_RH, beta_RH, state_RHKV):
    """The recurrence for one position of R rows: (y_RHV, next state), all float32."""
    state_RHKV = jnp.exp(log_alpha_RH)[..., None, None] * state_RHKV
    written_RHV = beta_RH[..., None] * (v_RHV - _einsum("rhkv,rhk->rhv", state_RHKV, k_RHK))
    state_RHKV = state_RHKV + k_RHK[..., None] * written_RHV[:, :, None, :]
    return _einsum("rhkv,rhk->rhv", state_RHKV, q_RHK), state_RHKV


def gated_delta(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    log_alpha_BLH: jax.Array,
    beta_BLH: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    block_len: int,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta_reference` as matmuls over blocks (arXiv 2412.06464, section 3.3, WY form).

    Let h be the state that enters a block and g_i the product of its decays up to i. The rule
    writes U = (I + A)^-1 (beta V - beta g K h) with A_ij = beta_i (g_i / g_j) k_i k_j' for j < i,
    and y = g Q h + (Q K' o (g_i / g_j)) U. Terms without h are computed for all blocks at once; a
    scan over blocks carries h. Equal neighbours in `segment_ids_BL` are one segment; segments are
    independent. Decays, states and the inverse are float32; operands of other matmuls have the
    dtype of `q_BLHK`. Returns float32 (y_BLHV, state after the last position (B, H, K, V)).
    """
    B, L, H, K = q_BLHK.shape
    T, einsum = min(block_len, L), partial(matmul_in, dtype=q_BLHK.dtype)

    def blocks(a):  # (B, L, H, ...) -> (B, N, H, T, ...); padding: beta = log_alpha = 0
        a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, -L % T)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, -1, T, *a.shape[2:]), 3, 2)

    arrays = (q_BLHK, k_BLHK, v_BLHV, log_alpha_BLH, beta_BLH)
    q, k, v, log_alpha_BNHT, beta_BNHT = map(blocks, arrays)
    # Padding continues the last segment, so the final state is that before the padding.
    ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, -L % T)), mode="edge")
    decays = _decays(log_alpha_BNHT, segment_marks(ids_BL.reshape(B, -1, T)))
    within_BNHTT, to_end_BNHT1, from_start_BNHT1, carry_BNH = decays

    beta_BNHT1 = beta_BNHT[..., None]
    scores_BNHTT = _einsum("bnhik,bnhjk->bnhij", beta_BNHT1 * k, k) * within_BNHTT
    solved_BNHTT = unit_lower_inverse(scores_BNHTT)
    own = einsum("bnhij,bnhjv->bnhiv", solved_BNHTT, beta_BNHT1 * v)
    of_state = einsum("bnhij,bnhjk->bnhik", solved_BNHTT, beta_BNHT1 * from_start_BNHT1 * k)
    mixed_BNHTT = einsum("bnhik,bnhjk->bnhij", q, k) * within_BNHTT

    def pass_on(state_BHKV, block):
        own, of_state, mixed_BHTT, q_start, k_end, carry_BH = block
        written = own - einsum("bhtk,bhkv->bhtv", of_state, state_BHKV)
        y = einsum("bhtk,bhkv->bhtv", q_start, state_BHKV)
        y = y + einsum("bhij,bhjv->bhiv", mixed_BHTT, written)
        added_BHKV = einsum("bhtk,bhtv->bhkv", k_end, written)
        return carry_BH[..., None, None] * state_BHKV + added_BHKV, y

    zero = jnp.zeros((B, H, K, v_BLHV.shape[-1]), jnp.float32)
    parts = (own, of_state, mixed_BNHTT, from_start_BNHT1 * q, to_end_BNHT1 * k, carry_BNH)
    state, y_NBHTV = jax.lax.scan(pass_on, zero, tuple(a.swapaxes(0, 1) for a in parts))
    y_BNTHV = y_NBHTV.transpose(1, 0, 3, 2, 4)
    return y_BNTHV.reshape(B, -1, *v_BLHV.shape[2:])[:, :L], state


def _decays(log_a_BNHT: jax.Array, marks: SegmentMarks) -> tuple[jax.Array, ...]:
    """exp of `log_decays`, with a last axis of 1 for those from and to a block's ends."""
    within_BNHTT, to_end_BNHT, from_start_BNHT, carry_BNH = map(
        jnp.exp, log_decays(log_a_BNHT, marks)
    )
    return within_BNHTT, to_end_BNHT[..., None], from_start_BNHT[..., None], carry_BNH


@jax.custom_vjp
def unit_lower_inverse(a_XTT: jax.Array) -> jax.Array:
    """(I + A)^-1, A = `a_XTT` below its diagonal; entries on and above the diagonal are ignored.

    Starts with blocks of size 1, whose inverse is 1, and doubles the block size: the inverse of
    [[P, 0], [C, Q]] is [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]]. This needs only matmuls and is as stable
    as forward substitution.
    """
    T, shape = a_XTT.shape[-1], a_XTT.shape[:-2]
    size = 1 << max(T - 1, 0).bit_length()
    padding = ((0, 0),) * len(shape) + ((0, size - T),) * 2
    a_XTT = jnp.pad(a_XTT, padding)
    inverse = jnp.ones((*shape, size, 1, 1), a_XTT.dtype)
    half = 1
    while half < size:
        pairs = size // (2 * half)
        grid = a_XTT.reshape(*shape, pairs, 2 * half, pairs, 2 * half)
        corner = jnp.moveaxis(jnp.diagonal(grid, axis1=-4, axis2=-2), -1, -3)[..., half:, :half]
        top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        below = -_einsum("...ij,...jk,...kl->...il", bottom, corner, top)
        upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([below, bottom], axis=-1)], axis=-2)
        half *= 2
    return inverse[..., 0, :T, :T]


def _unit_lower_inverse_fwd(a_XTT):
    inverse_XTT = unit_lower_inverse(a_XTT)
    return inverse_XTT, inverse_XTT


def _unit_lower_inverse_bwd(inverse_XTT, grad_XTT):
    below_TT = jnp.asarray(np.tri(grad_XTT.shape[-1], k=-1), grad_XTT.dtype)
    grad = -_einsum("...ji,...jk,...lk->...il", inverse_XTT, grad_XTT, inverse_XTT)
    return (grad * below_TT[(None,) * (grad.ndim - 2)],)


unit_lower_inverse.defvjp(_unit_lower_inverse_fwd, _unit_lower_inverse_bwd)
