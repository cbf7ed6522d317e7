"""The short causal convolution of recurrent mixers. Axes here: C channels, W taps."""

import jax
import jax.numpy as jnp

from hnet.nn.kernels.derivatives import silu_and_grad, written_once


@jax.custom_vjp
def causal_conv_silu(x_BLC, weight_WC, bias_C, segment_ids_BL) -> jax.Array:
    """silu of a depthwise causal convolution within each segment.

    Tap W-1 is the position itself. Computed in the dtype of x. silu is written with a division,
    which XLA's CPU backend computes once; it would recompute a product, and the convolution with
    it, at each use.
    """
    conv_BLC = _convolved(x_BLC, weight_WC, bias_C, _taps(segment_ids_BL, weight_WC))
    return written_once(conv_BLC / (1 + jnp.exp(-conv_BLC)))


def _taps(segment_ids_BL: jax.Array, weight_WC: jax.Array) -> jax.Array:
    """[back]: whether the position `back` places earlier is in the same segment; (W, B, L, 1)."""
    L, same = segment_ids_BL.shape[1], [jnp.ones_like(segment_ids_BL, bool)]
    for back in range(1, len(weight_WC)):
        same_BL = segment_ids_BL[:, back:] == segment_ids_BL[:, : max(L - back, 0)]
        same.append(jnp.pad(same_BL, ((0, 0), (min(back, L), 0))))
    return jnp.stack(same)[..., None]


def _earlier(x_BLC: jax.Array, taps_WBL1: jax.Array) -> list[jax.Array]:
    """x `back` places before each position, 0 in another segment, for back = 0 to W - 1.

    All are slices of one padded array, so that XLA reads the taps in one pass.
    """
    before, L = len(taps_WBL1) - 1, x_BLC.shape[1]
    padded = jnp.pad(x_BLC, ((0, 0), (before, 0), (0, 0)))
    shifted = [padded[:, before - back : before - back + L] for back in range(before + 1)]
    return [jnp.where(same_BL1, a_BLC, 0) for same_BL1, a_BLC in zip(taps_WBL1, shifted)]


def _convolved(x_BLC, weight_WC, bias_C, taps_WBL1):
    out_BLC = bias_C[None, None, :]
    for shifted_BLC, weight_C in zip(_earlier(x_BLC, taps_WBL1), weight_WC[::-1]):
        out_BLC = out_BLC + shifted_BLC * weight_C[None, None, :]
    return out_BLC


def _causal_conv_silu_bwd(saved, dout_BLC):
    x_BLC, weight_WC, bias_C, segment_ids_BL = saved
    taps_WBL1 = _taps(segment_ids_BL, weight_WC)
    conv_BLC = _convolved(x_BLC, weight_WC, bias_C, taps_WBL1)
    dconv_BLC = (dout_BLC * silu_and_grad(conv_BLC)[1]).astype(x_BLC.dtype)
    L, after = x_BLC.shape[1], ((0, 0), (0, len(weight_WC) - 1), (0, 0))
    padded = jnp.pad(dconv_BLC, after)
    dx_BLC, dweights = jnp.zeros_like(x_BLC), []
    for back, same_BL1 in enumerate(taps_WBL1):
        same_BL1 = jnp.pad(same_BL1, after)[:, back : back + L]
        from_later_BLC = jnp.where(same_BL1, padded[:, back : back + L], 0)
        dx_BLC += from_later_BLC * weight_WC[-1 - back][None, None, :]
        dweights.append(jnp.sum(from_later_BLC * x_BLC, axis=(0, 1)))
    return dx_BLC, jnp.stack(dweights[::-1]), jnp.sum(dconv_BLC, axis=(0, 1)), None


causal_conv_silu.defvjp(lambda *inputs: (causal_conv_silu(*inputs), inputs), _causal_conv_silu_bwd)


def conv_silu_step(taps_RWC: jax.Array, weight_WC: jax.Array, bias_C: jax.Array) -> jax.Array:
    """`causal_conv_silu` for the last of W positions, (R, 1, C)."""
    convolved = bias_C[None, None]
    for tap in range(len(weight_WC)):  # faster than a reduction over a short axis
        convolved = convolved + taps_RWC[:, tap : tap + 1] * weight_WC[None, None, tap]
    return jax.nn.silu(convolved)
