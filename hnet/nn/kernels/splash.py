"""Attention on TPUs by JAX's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention)."""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # of a TPU's vector registers: blocks of positions are multiples
MAX_BLOCK = 512


def attention_splash(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, *, window=-1, block_len=MAX_BLOCK, interpret=False
) -> jax.Array:
    """`hnet.nn.attention.attention_reference`; scores and softmax stay on the chip.

    block_len: positions a block at most, a multiple of 128. A row that is alone on its device
    (many documents, or the chunks of several rows) skips the blocks without a common segment.
    interpret: run as ordinary JAX, on any device.
    """
    B, L, H, K = q_BLHK.shape
    T = min(block_len, -(-L // LANES) * LANES)
    scaled_BLHK = (q_BLHK.astype(jnp.float32) / math.sqrt(K)).astype(q_BLHK.dtype)
    arrays = (scaled_BLHK, k_BLHK, v_BLHK, segment_ids_BL)
    q, k, v, segment_ids_BL = (
        jnp.pad(a, ((0, 0), (0, -L % T)) + ((0, 0),) * (a.ndim - 2)) for a in arrays
    )
    kernel = _kernel(H, q.shape[1], T, window, interpret)
    if B == 1 and L > T:  # under vmap the list of blocks would be the same for all rows
        kernel = _only_common_segments(kernel, segment_ids_BL[0], T)

    def one_row(q_HLK, k_HLK, v_HLK, segment_ids_L):
        return kernel(q_HLK, k_HLK, v_HLK, splash.SegmentIds(segment_ids_L, segment_ids_L))

    inputs = (*(a.swapaxes(1, 2) for a in (q, k, v)), segment_ids_BL)
    if B == 1:
        out_BHLK = one_row(*(a[0] for a in inputs))[None]
    else:
        out_BHLK = jax.vmap(one_row)(*inputs)
    return out_BHLK.swapaxes(1, 2)[:, :L]


@lru_cache(maxsize=64)
def _kernel(H: int, L: int, T: int, window: int, interpret: bool):
    """The kernel for one row; what it knows of the mask is worked out once a shape."""
    one_head = splash.CausalMask((L, L))
    if window >= 0:
        one_head = splash.LocalMask((L, L), (window, 0), 0)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([one_head] * H),
            block_sizes=splash.BlockSizes(*[T] * 8), head_shards=1, q_seq_shards=1,
            interpret=interpret,
        )  # fmt: skip
        return jax.tree.map(np.asarray, kernel)


def _only_common_segments(kernel, segment_ids_L: jax.Array, T: int):
    """`kernel` without the pairs of blocks whose ranges of segment ids do not meet."""
    last = jnp.iinfo(segment_ids_L.dtype).max  # where padding (0) mostly is
    by_block = jnp.where(segment_ids_L == 0, last, segment_ids_L).reshape(-1, T)
    low, high = by_block.min(axis=1), by_block.max(axis=1)
    meet = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])

    def filtered(info, meets):
        return info._replace(block_mask=jnp.where(meets, info.block_mask, 0))

    fwd, dq, dkv = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    block = jnp.arange(len(low))
    # data_next is, of each entry that is not masked out anyway, the key (or query) block itself
    queries = [filtered(i, meet[block[None, :, None], i.data_next]) for i in (fwd, dq)]
    keys = filtered(dkv, meet[dkv.data_next, block[None, None, :]])
    return type(kernel)(*queries, keys, **kernel.kwargs)
