"""Multi-head attention over packed rows: reference forms, and blockwise causal attention."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hnet.cost import trips
from hnet.nn.cache import KVCache, read
from hnet.nn.layers import segment_positions


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
) -> jax.Array:
    """`masked_attention` over the visible keys, in one block.

    A query at i sees the keys j of its own segment with i - window <= j <= i (all j <= i if window
    is -1); with causal=False also those with i <= j <= i + window. `q_BLHK` may be a slice of the
    rows that starts at `offset`; keys start at 0.
    """
    query_index = offset + jnp.arange(q_BLHK.shape[1], dtype=jnp.int32)[:, None]
    key_index = jnp.arange(k_BLHK.shape[1], dtype=jnp.int32)[None, :]
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
        q_BTHK = _cut(q_BLHK, i, T, axis=1)
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


def attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segment_ids_BL: jax.Array,
    *,
    window: int = -1,
    block_len: int = 128,
) -> jax.Array:
    """Blockwise `attention_reference`; equal neighbouring segment ids are one segment.

    Blocks of keys that are invisible to a block of queries (causality, window or segments) are
    skipped, so the cost of a row depends on its segments (arXiv 2205.14135, with loop bounds that
    are known at run time). The backward pass recomputes scores: memory is linear in L.
    """
    B, L, H, _ = q_BLHK.shape
    T = min(block_len, L)
    padded = -(-L // T) * T
    index_L = jnp.arange(padded, dtype=jnp.int32)
    segment_ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, padded - L)), constant_values=-1)
    first_BL = index_L[None, :] - segment_positions(segment_ids_BL)
    if window >= 0:
        first_BL = jnp.maximum(first_BL, index_L[None, :] - window)

    def heads_first(x_BLHK):
        return jnp.pad(x_BLHK, ((0, 0), (0, padded - L), (0, 0), (0, 0))).swapaxes(1, 2)

    q_BHLK, k_BHLK, v_BHLK = map(heads_first, (q_BLHK, k_BLHK, v_BLHK))
    scaled_BHLK = q_BHLK * jnp.asarray(1 / math.sqrt(q_BHLK.shape[-1]), q_BHLK.dtype)
    with trips(_mean_trips(padded // T, T, window)):
        return _by_blocks(scaled_BHLK, k_BHLK, v_BHLK, first_BL, T).swapaxes(1, 2)[:, :L]


def _mean_trips(blocks: int, T: int, window: int) -> float:
    """Mean number of key blocks per query block in a row of one segment."""
    first = (0 if window < 0 else max(0, i * T - window) // T for i in range(blocks))
    return sum(i + 1 - j for i, j in enumerate(first)) / blocks


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(q_BHLK, k_BHLK, v_BHLK, first_BL, T):
    """softmax(q k') v over the keys from `first_BL` to the query itself; T divides L."""
    return _by_blocks_fwd(q_BHLK, k_BHLK, v_BHLK, first_BL, T)[0]


def _by_blocks_fwd(q_BHLK, k_BHLK, v_BHLK, first_BL, T):
    first_block = _first_blocks(first_BL, T)
    B, H, L, K = q_BHLK.shape

    def query_block(i):
        q_BHTK, first_BT = _cut(q_BHLK, i, T), _cut(first_BL, i, T, axis=1)

        def key_block(j, carry):
            max_BHT, sum_BHT, out_BHTK = carry
            scores_BHTM = _einsum("bhtk,bhmk->bhtm", q_BHTK, _cut(k_BHLK, j, T))
            visible_BTM = _visible(first_BT, i, j, T)
            scores_BHTM = jnp.where(visible_BTM[:, None], scores_BHTM, -jnp.inf)
            new_max_BHT = jnp.maximum(max_BHT, jnp.max(scores_BHTM, axis=-1))
            weights_BHTM = jnp.exp(scores_BHTM - new_max_BHT[..., None])
            shrink_BHT = jnp.exp(max_BHT - new_max_BHT)
            added_BHTK = _einsum(
                "bhtm,bhmk->bhtk", weights_BHTM.astype(v_BHLK.dtype), _cut(v_BHLK, j, T)
            )
            sum_BHT = sum_BHT * shrink_BHT + jnp.sum(weights_BHTM, axis=-1)
            return new_max_BHT, sum_BHT, out_BHTK * shrink_BHT[..., None] + added_BHTK

        lowest_BHT = jnp.full((B, H, T), jnp.finfo(jnp.float32).min)
        nothing = (lowest_BHT, jnp.zeros((B, H, T)), jnp.zeros((B, H, T, K)))
        max_BHT, sum_BHT, out_BHTK = _loop(first_block, i, key_block, nothing)
        out_BHTK = (out_BHTK / sum_BHT[..., None]).astype(q_BHLK.dtype)
        return out_BHTK, max_BHT + jnp.log(sum_BHT)

    out, log_sum = jax.lax.map(query_block, jnp.arange(L // T, dtype=jnp.int32))
    out_BHLK, log_sum_BHL = (
        jnp.moveaxis(a, 0, 2).reshape(B, H, L, *a.shape[4:]) for a in (out, log_sum)
    )
    return out_BHLK, (q_BHLK, k_BHLK, v_BHLK, first_BL, out_BHLK, log_sum_BHL)


def _by_blocks_bwd(T, saved, grad_BHLK):
    """Scores have the keys first and dq its channels first, so that no product contracts the rows
    of its left operand, which is slow in XLA's CPU backend."""
    q_BHLK, k_BHLK, v_BHLK, first_BL, out_BHLK, log_sum_BHL = saved
    first_block = _first_blocks(first_BL, T)
    grad_dot_out_BHL = jnp.sum(
        grad_BHLK.astype(jnp.float32) * out_BHLK.astype(jnp.float32), axis=-1
    )
    dtype, k_BHKL = q_BHLK.dtype, jax.lax.optimization_barrier(k_BHLK.swapaxes(2, 3))

    def query_block(carry, i):
        q, grad = _cut(q_BHLK, i, T), _cut(grad_BHLK, i, T)
        log_sum, grad_dot_out = _cut(log_sum_BHL, i, T), _cut(grad_dot_out_BHL, i, T)
        first_BT = _cut(first_BL, i, T, axis=1)

        def key_block(j, carry):
            dq_BHKT, dk_BHLK, dv_BHLK = carry
            k, v = _cut(k_BHLK, j, T), _cut(v_BHLK, j, T)
            scores_BHMT = _einsum("bhmk,bhtk->bhmt", k, q)
            visible_BMT = _visible(first_BT, i, j, T).swapaxes(1, 2)
            weights_BHMT = jnp.exp(
                jnp.where(visible_BMT[:, None], scores_BHMT - log_sum[:, :, None], -jnp.inf)
            )
            dv = _einsum("bhmt,bhtk->bhmk", weights_BHMT.astype(dtype), grad)
            dweights_BHMT = _einsum("bhmk,bhtk->bhmt", v, grad)
            dscores_BHMT = weights_BHMT * (dweights_BHMT - grad_dot_out[:, :, None])
            dscores_BHMT = dscores_BHMT.astype(dtype)
            dk = _einsum("bhmt,bhtk->bhmk", dscores_BHMT, q)
            dq_BHKT += _einsum("bhkm,bhmt->bhkt", _cut(k_BHKL, j, T, axis=3), dscores_BHMT)
            return dq_BHKT, _add_to(dk_BHLK, dk, j, T), _add_to(dv_BHLK, dv, j, T)

        nothing = jnp.zeros(q.swapaxes(2, 3).shape)
        dq_BHKT, *carry = _loop(first_block, i, key_block, (nothing, *carry))
        return tuple(carry), jax.lax.optimization_barrier(dq_BHKT).swapaxes(2, 3)

    zeros = jnp.zeros(k_BHLK.shape)
    blocks = jnp.arange(q_BHLK.shape[2] // T, dtype=jnp.int32)
    (dk_BHLK, dv_BHLK), dq = jax.lax.scan(query_block, (zeros, zeros), blocks)
    dq_BHLK = jnp.moveaxis(dq, 0, 2).reshape(q_BHLK.shape)
    return dq_BHLK.astype(dtype), dk_BHLK.astype(dtype), dv_BHLK.astype(dtype), None


_by_blocks.defvjp(_by_blocks_fwd, _by_blocks_bwd)


@jax.custom_batching.custom_vmap
def _first_key_block(first_BN: jax.Array) -> jax.Array:
    """Minimum over rows. Under vmap: over all batch elements too, so that they share one loop."""
    return jnp.min(first_BN, axis=0)


@_first_key_block.def_vmap
def _(size, _batched, first_SBN):
    return _first_key_block(first_SBN.reshape(-1, first_SBN.shape[-1])), False


def _first_blocks(first_BL: jax.Array, T: int) -> jax.Array:
    """First key block that each query block sees, which is that of its first query."""
    return _first_key_block(first_BL.reshape(len(first_BL), -1, T)[:, :, 0]) // T


def _loop(first_block, i, body, carry):
    if len(first_block) == 1:  # one block: call the body without a loop
        return body(0, carry)
    return jax.lax.fori_loop(first_block[i], i + 1, body, carry)


def _visible(first_BT, i, j, T):
    """Keys of block j that the queries of block i see, bool (B, T, T)."""
    index_T = jnp.arange(T, dtype=jnp.int32)
    key_T, query_T = j * T + index_T, i * T + index_T
    causal_TM = key_T[None, :] <= query_T[:, None]
    return causal_TM[None] & (key_T[None, None, :] >= first_BT[:, :, None])


def _cut(a, i, T, axis=2):
    return jax.lax.dynamic_slice_in_dim(a, i * T, T, axis)


def _add_to(a_BHLK, new_BHTK, j, T):
    return jax.lax.dynamic_update_slice_in_dim(a_BHLK, _cut(a_BHLK, j, T) + new_BHTK, j * T, 2)


def _einsum(spec, *operands):
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


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
    blocks, T = cache.k.shape[2], cache.k.shape[4]
    shared = q_RHK.shape[1] // cache.k.shape[3]
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
