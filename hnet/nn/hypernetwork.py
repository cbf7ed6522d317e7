"""Embeddings of new tokens from those of the tokens that they consist of (ZeTT, arXiv 2405.07883).

As there, a new token is spelled in old ones, which a small Transformer reads: one block of
bidirectional attention over their embeddings with learned positions, and a mean. Input and output
embedding are the mean of the old ones plus a linear map of the result, which is zero at first.
"""

import jax
import jax.numpy as jnp
from flax import nnx

LONGEST = 16
"""maximum number of old tokens per new one"""


class Hypernetwork(nnx.Module):
    """(input embedding, output embedding) of each of N new tokens."""

    def __init__(self, width: int, *, heads: int = 2, rngs: nnx.Rngs):
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LONGEST, width)))
        self.norm, self.norm_mlp = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)
        zero = nnx.initializers.zeros_init()
        self.head = nnx.Linear(width, 2 * width, kernel_init=zero, rngs=rngs)

    def __call__(
        self, in_NKD: jax.Array, out_NKD: jax.Array, mask_NK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """in_NKD, out_NKD: embeddings of the old tokens; mask_NK: those that exist, at least one
        per new token."""
        exists_NK1 = mask_NK.astype(jnp.float32)[..., None]
        share_NK1 = exists_NK1 / jnp.sum(exists_NK1, axis=1, keepdims=True)
        x_NKD = in_NKD + self.positions[...][None, : in_NKD.shape[1]]
        mask_N1KK = mask_NK[:, None, None, :] & mask_NK[:, None, :, None]
        x_NKD = x_NKD + self.attention(self.norm(x_NKD), mask=mask_N1KK)
        x_NKD = x_NKD + self.narrow(nnx.gelu(self.widen(self.norm_mlp(x_NKD))))
        change_N2D = self.head(jnp.sum(x_NKD * share_NK1, axis=1))
        in_ND, out_ND = jnp.split(change_N2D, 2, axis=1)
        mean = lambda old_NKD: jnp.sum(old_NKD * share_NK1, axis=1)
        return mean(in_NKD) + in_ND, mean(out_NKD) + out_ND
