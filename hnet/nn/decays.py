"""Logarithms of the decays of a state within blocks of packed rows, for gated DeltaNet and mLSTM.

Axes here: H heads, T positions per block, N blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hnet.nn.ssd import SegmentMarks

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def log_decays(log_a_BNHT: jax.Array, marks: SegmentMarks) -> tuple[jax.Array, ...]:
    """Logarithms of the decay factors of a state, -inf across a segment boundary: from j to i
    (B, N, H, T, T), -inf for j > i; to the block's end and from its start (B, N, H, T); through the
    block (B, N, H).

    Sums restart at each segment, so no gradient reaches another segment, not even by rounding. As
    in `hnet.nn.ssd`, each logarithm is split into a multiple of 2^-8, whose sums are exact, and a
    small remainder.
    """
    same_BNTT = jnp.exp(marks.log_same_BKTT)
    causal_TT = np.tri(log_a_BNHT.shape[-1], dtype=bool)

    def sums(a_BNHT, over_TT):  # [i]: sum of a_j over j in the segment of i with over[i, j]
        over_BNTT = same_BNTT * jnp.asarray(over_TT, jnp.float32)[None, None]
        return _einsum("bnhj,bnij->bnhi", a_BNHT, over_BNTT)

    coarse_BNHT = jnp.round(log_a_BNHT * 256) / 256
    parts = sums(coarse_BNHT, causal_TT), sums(log_a_BNHT - coarse_BNHT, causal_TT)
    coarse_BNHTT, rest_BNHTT = (a[..., :, None] - a[..., None, :] for a in parts)
    causal_11TT = jnp.asarray(np.where(causal_TT, 0, -np.inf), jnp.float32)[None, None]
    mask_BNTT = marks.log_same_BKTT + causal_11TT
    within_BNHTT = coarse_BNHTT + rest_BNHTT + mask_BNTT[:, :, None]
    from_start_BNHT = parts[0] + parts[1]
    from_start_BNHT = jnp.where(marks.reaches_BKT[:, :, None], from_start_BNHT, -jnp.inf)
    to_end_BNHT = sums(log_a_BNHT, ~causal_TT)
    to_end_BNHT = jnp.where(marks.to_end_BKT[:, :, None], to_end_BNHT, -jnp.inf)
    carry_BNH = jnp.where(marks.stays_BK[..., None], from_start_BNHT[..., -1], -jnp.inf)
    return within_BNHTT, to_end_BNHT, from_start_BNHT, carry_BNH
