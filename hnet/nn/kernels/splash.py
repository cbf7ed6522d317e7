"""Attention on TPUs with JAX's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention)."""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # lanes per TPU vector register; block lengths are multiples of it
MAX_BLOCK = 512


def attention_splash(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, *, window=-1, block_len=MAX_BLOCK, interpret=False
) -> jax.Array:
    """`hnet.nn.attention.attention_reference`; scores and softmax stay in on-chip memory.

    block_len: maximum number of positions per block, a multiple of 128. If a device has one row
    (many documents, or the chunks of several rows), pairs of blocks without a common segment are
    skipped. interpret: run as ordinary JAX, on any device.
    """
    B, L, H, K = q_BLHK.shape
    T = min(block_len, -(-L // LANES) * LANES)
    scaled_BLHK = (q_BLHK.astype(jnp.float32) / math.sqrt(K)).astype(q_BLHK.dtype)
    arrays = (scaled_BLHK, k_BLHK, v_BLHK, segment_ids_BL)
    q, k, v, segment_ids_BL = (
        jnp.pad(a, ((0, 0), (0, -L % T)) + ((0, 0),) * (a.ndim - 2)) for a in arrays
    )
    kernel = _kernel(H, q.shape[1], T, window, interpret)
    if B == 1 and L > T:  # under vmap all rows share one list of blocks
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
    """The kernel for one row; its mask info is computed once per shape."""
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
    """`kernel` without the pairs of blocks whose ranges of segment ids do not overlap."""
    last = jnp.iinfo(segment_ids_L.dtype).max  # id of padding (0), which mostly ends a row
    by_block = jnp.where(segment_ids_L == 0, last, segment_ids_L).reshape(-1, T)
    low, high = by_block.min(axis=1), by_block.max(axis=1)
    meet = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])

    def filtered(info, meets):
        return info._replace(block_mask=jnp.where(meets, info.block_mask, 0))

    fwd, dq, dkv = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    block = jnp.arange(len(low))
    # data_next is the index of the key (or query) block for every entry that is not masked out
    queries = [filtered(i, meet[block[None, :, None], i.data_next]) for i in (fwd, dq)]
    keys = filtered(dkv, meet[dkv.data_next, block[None, None, :]])
    return type(kernel)(*queries, keys, **kernel.kwargs)
