"""Attention on NVIDIA GPUs with cuDNN. Not yet run on a GPU.

JAX's wrapper takes no segment ids, so documents are separated by a mask. cuDNN also supports
document offsets, but not in that wrapper, and only for a static number of documents.
"""

import jax
import jax.numpy as jnp

BLOCK_LEN, MAX_BLOCKS = 2048, 16
MAX_CHANNELS = 128  # maximum number of channels per head on any GPU


def attention_cudnn(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, *, window=-1, block_len=BLOCK_LEN, library="cudnn"
) -> jax.Array:
    """`hnet.nn.attention.attention_reference` per block of queries, with the keys in its range.

    Each block has its own mask, so the mask of the whole row is built only if the row is one block.
    A block whose keys start with its queries is marked causal, so that cuDNN skips half of the
    work. Lengths and channels are padded to multiples of 8. library: "xla" computes the same on any
    device.

    Raises ValueError for more than 128 channels per head.
    """
    B, L, H, K = q_BLHK.shape
    if K > MAX_CHANNELS:
        raise ValueError(
            f"{K} channels per head: cuDNN takes at most {MAX_CHANNELS}; use "
            "--model.compute.attention_backend xla"
        )
    pads = ((0, 0), (0, -L % 8), (0, 0), (0, -K % 8))
    q_BLHK, k_BLHK, v_BLHK = (jnp.pad(a, pads) for a in (q_BLHK, k_BLHK, v_BLHK))
    segment_ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, -L % 8)), constant_values=-1)
    padded = q_BLHK.shape[1]
    block_len = -(-max(block_len, -(-padded // MAX_BLOCKS)) // 8) * 8
    index_L = jnp.arange(padded, dtype=jnp.int32)
    out = []
    for start in range(0, padded, block_len):
        queries = slice(start, min(start + block_len, padded))
        keys = slice(0 if window < 0 else max(0, start - window) // 8 * 8, queries.stop)
        age_LM = index_L[queries, None] - index_L[None, keys]
        visible_LM = (age_LM >= 0) & ((age_LM <= window) | (window < 0))
        same_BLM = segment_ids_BL[:, queries, None] == segment_ids_BL[:, None, keys]
        mask_BHLM = (same_BLM & visible_LM[None])[:, None]
        out.append(
            jax.nn.dot_product_attention(
                q_BLHK[:, queries], k_BLHK[:, keys], v_BLHK[:, keys],
                mask=mask_BHLM, scale=K**-0.5, is_causal=keys.start == start,
                implementation=library,
            )
        )  # fmt: skip
    return jnp.concatenate(out, axis=1)[:, :L, :, :K]
