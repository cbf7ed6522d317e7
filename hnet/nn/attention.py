"""Multi-head attention over packed rows, groups of keys, and a cache, in plain array code."""

import math

import jax
import jax.numpy as jnp

from hnet.nn.cache import KVCache, read


def masked_attention(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    visible_BLM: jax.Array,
    *,
    key_bias_BM: jax.Array | None = None,
    sink_H: jax.Array | None = None,
    soft_cap: float = 0.0,
) -> jax.Array:
    """softmax(score + key_bias) v over the visible keys, score = q k' / sqrt(K).

    soft_cap: c, scores become c tanh(score / c) (arXiv 2408.00118); 0 = none. sink_H: additional
    logit per head in the softmax, without a value (arXiv 2309.17453; 0 is the "softmax + 1"). The
    output of a query that sees no key is 0. Scores and softmax are float32.
    """
    scores_BHLM = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BMHK, preferred_element_type=jnp.float32)
    scores_BHLM = scores_BHLM / math.sqrt(q_BLHK.shape[-1])
    if soft_cap:
        scores_BHLM = soft_cap * jnp.tanh(scores_BHLM / soft_cap)
    if key_bias_BM is not None:
        scores_BHLM = scores_BHLM + key_bias_BM[:, None, None, :]
    visible_B1LM = visible_BLM[:, None]
    scores_BHLM = jnp.where(visible_B1LM, scores_BHLM, jnp.finfo(jnp.float32).min)
    if sink_H is not None:
        sink_BHL1 = jnp.broadcast_to(sink_H[None, :, None, None], (*scores_BHLM.shape[:3], 1))
        scores_BHLM = jnp.concatenate([scores_BHLM, sink_BHL1], axis=-1)
    weights_BHLM = jax.nn.softmax(scores_BHLM, axis=-1)[..., : k_BMHK.shape[1]]
    weights_BHLM = jnp.where(visible_B1LM, weights_BHLM, 0.0).astype(v_BMHK.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights_BHLM, v_BMHK)


def attention_reference(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segment_ids_BL: jax.Array,
    key_bias_BL: jax.Array | None = None,
    sink_H: jax.Array | None = None,
    *,
    window: int = -1,
    causal: bool = True,
    soft_cap: float = 0.0,
    offset: int | jax.Array = 0,
    vectors: int = 1,
) -> jax.Array:
    """`masked_attention` over the visible keys, in one block.

    A query at i sees the keys j of its own segment with i - window <= j <= i (all j <= i if window
    is -1); with causal=False also those with i <= j <= i + window. `q_BLHK` may be a slice of the
    rows that starts at `offset`; keys start at 0. vectors: number of neighbouring entries that are
    one position, and see each other.
    """
    query_index = offset + jnp.arange(q_BLHK.shape[1], dtype=jnp.int32)[:, None]
    key_index = jnp.arange(k_BLHK.shape[1], dtype=jnp.int32)[None, :]
    if vectors > 1:
        query_index, key_index = query_index // vectors, key_index // vectors
    age_LM = query_index - key_index
    visible_LM = age_LM >= 0 if causal else jnp.ones_like(age_LM, bool)
    if window >= 0:
        visible_LM &= jnp.abs(age_LM) <= window
    segment_q = jax.lax.dynamic_slice_in_dim(segment_ids_BL, offset, q_BLHK.shape[1], axis=1)
    visible_BLM = visible_LM[None] & (segment_q[:, :, None] == segment_ids_BL[:, None, :])
    return masked_attention(
        q_BLHK, k_BLHK, v_BLHK, visible_BLM,
        key_bias_BM=key_bias_BL, sink_H=sink_H, soft_cap=soft_cap,
    )  # fmt: skip


def attention_by_queries(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, key_bias_BL=None, sink_H=None, *, block_len, **options
) -> jax.Array:
    """`attention_reference` for one block of queries at a time: memory is linear in L."""
    L = q_BLHK.shape[1]
    T = min(block_len, L)

    @jax.checkpoint
    def block(i, q_BLHK, k_BLHK, v_BLHK):
        q_BTHK = jax.lax.dynamic_slice_in_dim(q_BLHK, i * T, T, axis=1)
        return attention_reference(
            q_BTHK, k_BLHK, v_BLHK, segment_ids_BL, key_bias_BL, sink_H, offset=i * T, **options
        )

    # Padding has segment id -1, so no query of a real segment sees a key of the padding.
    padding = ((0, 0), (0, -L % T))
    q_BLHK, k_BLHK, v_BLHK = (
        jnp.pad(a, (*padding, (0, 0), (0, 0))) for a in (q_BLHK, k_BLHK, v_BLHK)
    )
    segment_ids_BL = jnp.pad(segment_ids_BL, padding, constant_values=-1)
    if key_bias_BL is not None:
        key_bias_BL = jnp.pad(key_bias_BL, padding)
    blocks = jnp.arange(q_BLHK.shape[1] // T, dtype=jnp.int32)
    out = jax.lax.map(lambda i: block(i, q_BLHK, k_BLHK, v_BLHK), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(q_BLHK.shape)[:, :L]


def grouped_attention(
    q_GQHK: jax.Array,
    k_GMNHK: jax.Array,
    v_GMNHK: jax.Array,
    q_group_GQ: jax.Array,
    group_GM: jax.Array | None = None,
    segment_ids_GQ: jax.Array | None = None,
    segment_ids_GM: jax.Array | None = None,
    *,
    relation: str,
    window: int = 1,
) -> jax.Array:
    """Attention of queries to M groups (chunks) of N keys; group numbers increase along a row.

    The newest group that a query sees is its own (relation "equal") or the one before it
    ("last_closed"). It sees the last `window` groups (-1: all) up to the newest, in its own
    segment. Groups with a negative number are invisible. A query that sees no key has output 0.
    group_GM: None: group m is at index m; then each query gathers the keys of its window, at a
    cost linear in Q.
    """
    match relation:
        case "equal":
            newest_GQ = q_group_GQ
        case "last_closed":
            newest_GQ = q_group_GQ - 1
        case _:
            raise ValueError(f"relation={relation!r}: use 'equal' or 'last_closed'")
    (G, Q, H, _), (_, M, N, *_) = q_GQHK.shape, k_GMNHK.shape
    if group_GM is None and 0 <= window < M:
        index_GQW = newest_GQ[..., None] - jnp.arange(window, dtype=jnp.int32)[None, None]
        take = jax.vmap(lambda a_M, index: a_M.at[index].get(mode="clip"))
        visible_GQW = (index_GQW >= 0) & (index_GQW < M)
        if segment_ids_GM is not None:
            visible_GQW &= segment_ids_GQ[..., None] == take(segment_ids_GM, index_GQW)
        by_query = lambda a: take(a, index_GQW).reshape(G * Q, window * N, H, -1)
        visible_X1K = jnp.repeat(visible_GQW, N, axis=-1).reshape(G * Q, 1, window * N)
        q_X1HK = q_GQHK.reshape(G * Q, 1, H, -1)
        out = masked_attention(q_X1HK, by_query(k_GMNHK), by_query(v_GMNHK), visible_X1K)
        return out.reshape(G, Q, H, -1)
    if group_GM is None:
        group_GM = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (G, M))
    age_GQM = newest_GQ[:, :, None] - group_GM[:, None, :]
    visible_GQM = (age_GQM >= 0) & (group_GM >= 0)[:, None, :]
    if window >= 0:
        visible_GQM &= age_GQM < window
    if segment_ids_GM is not None:
        visible_GQM &= segment_ids_GQ[:, :, None] == segment_ids_GM[:, None, :]
    k, v = (a.reshape(G, M * N, H, -1) for a in (k_GMNHK, v_GMNHK))
    return masked_attention(q_GQHK, k, v, jnp.repeat(visible_GQM, N, axis=-1))


def cached_attention(
    q_RHK: jax.Array,
    cache: KVCache,
    at: tuple,
    positions_R: jax.Array,
    *,
    window: int,
    first_R: jax.Array | None = None,
    sink_H: jax.Array | None = None,
    soft_cap: float = 0.0,
) -> jax.Array:
    """`attention_reference` for the newest position of R rows; its key is already in the cache.

    Positions before `first_R` are invisible. The cache may have fewer heads than q; each is then
    shared by equally many neighbouring query heads. Blocks of slots are read one at a time with an
    online softmax, up to the last block that the longest of these rows has filled, so the cost
    depends on the length, not on the size of the cache.
    """
    blocks, T = cache.k.shape[-4], cache.k.shape[-2]
    shared = q_RHK.shape[1] // cache.k.shape[-3]
    filled = jnp.minimum(jnp.max(positions_R) // T + 1, blocks)
    visible = positions_R if window < 0 else jnp.minimum(positions_R, window)
    if first_R is not None:
        visible = jnp.minimum(visible, positions_R - first_R)

    def block(j, carry):
        max_RH, sum_RH, out_RHK = carry
        keys, values = (share_heads(read(a, (*at, j)), shared) for a in cache[:2])
        age_RT = (positions_R[:, None] - (j * T + jnp.arange(T))[None, :]) % (blocks * T)
        scores_RHT = jnp.einsum("rhk,rhtk->rht", q_RHK, keys, preferred_element_type=jnp.float32)
        scores_RHT = scores_RHT / math.sqrt(q_RHK.shape[-1])
        if soft_cap:
            scores_RHT = soft_cap * jnp.tanh(scores_RHT / soft_cap)
        if cache.bias is not None:
            scores_RHT = scores_RHT + read(cache.bias, (*at, j))[:, None]
        scores_RHT = jnp.where((age_RT <= visible[:, None])[:, None], scores_RHT, -jnp.inf)
        new_max_RH = jnp.maximum(max_RH, jnp.max(scores_RHT, axis=-1))
        weights_RHT = jnp.exp(scores_RHT - new_max_RH[..., None])
        shrink_RH = jnp.exp(max_RH - new_max_RH)
        added_RHK = jnp.einsum(
            "rht,rhtk->rhk", weights_RHT.astype(values.dtype), values,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        sum_RH = sum_RH * shrink_RH + jnp.sum(weights_RHT, axis=-1)
        return new_max_RH, sum_RH, out_RHK * shrink_RH[..., None] + added_RHK

    lowest_RH = jnp.full(q_RHK.shape[:2], jnp.finfo(jnp.float32).min)
    nothing = (lowest_RH, jnp.zeros_like(lowest_RH), jnp.zeros(q_RHK.shape, jnp.float32))
    if sink_H is not None:
        sink_RH = jnp.broadcast_to(sink_H[None], lowest_RH.shape)
        nothing = (sink_RH, jnp.ones_like(sink_RH), nothing[2])
    _, sum_RH, out_RHK = jax.lax.fori_loop(0, filled, block, nothing)
    return (out_RHK / sum_RH[..., None]).astype(q_RHK.dtype)


def share_heads(a_XHXX: jax.Array, count: int, axis: int = 1) -> jax.Array:
    """Repeat each head `count` times, copies next to each other."""
    return a_XHXX if count == 1 else jnp.repeat(a_XHXX, count, axis=axis)
