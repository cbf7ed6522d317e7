"""Attention on NVIDIA GPUs by cuDNN. Never run: no GPU was at hand."""

import jax
import jax.numpy as jnp

BLOCK_LEN, MAX_BLOCKS = 1024, 16


def attention_cudnn(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, *, window=-1, block_len=BLOCK_LEN, library="cudnn"
) -> jax.Array:
    """`hnet.nn.attention.attention_reference` by blocks of queries, each with the keys it may see.

    cuDNN knows no segment ids, so each block has a mask; it is never that of the whole row. A
    GPU needs bfloat16 and at most 128 channels a head. library: "xla" computes the same anywhere.
    """
    L = q_BLHK.shape[1]
    block_len = max(block_len, -(-L // MAX_BLOCKS))
    index_L = jnp.arange(L, dtype=jnp.int32)
    out = []
    for start in range(0, L, block_len):
        queries = slice(start, min(start + block_len, L))
        keys = slice(0 if window < 0 else max(0, start - window), queries.stop)
        age_LM = index_L[queries, None] - index_L[None, keys]
        visible_LM = (age_LM >= 0) & ((age_LM <= window) | (window < 0))
        same_BLM = segment_ids_BL[:, queries, None] == segment_ids_BL[:, None, keys]
        mask_BHLM = (same_BLM & visible_LM[None])[:, None]
        out.append(
            jax.nn.dot_product_attention(
                q_BLHK[:, queries], k_BLHK[:, keys], v_BLHK[:, keys],
                mask=mask_BHLM, implementation=library,
            )
        )  # fmt: skip
    return jnp.concatenate(out, axis=1)
