"""The equations as plain loops in float64: slow, but short enough to check by reading."""

import numpy as np


def ssd(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, segment_ids_BL):
    """State of H x P x N; h = exp(dt A) h + dt x B', y = h C, from zero in each segment."""
    out = np.zeros(x_BLHP.shape)
    for b, x_LHP in enumerate(np.float64(x_BLHP)):
        state = np.zeros((*x_LHP.shape[1:], B_BLN.shape[-1]))
        for t, x in enumerate(x_LHP):
            if t and segment_ids_BL[b, t] != segment_ids_BL[b, t - 1]:
                state[:] = 0
            for h, A in enumerate(np.float64(A_H)):
                dt = float(dt_BLH[b, t, h])
                state[h] = np.exp(dt * A) * state[h] + dt * np.outer(x[h], B_BLN[b, t])
                out[b, t, h] = state[h] @ C_BLN[b, t]
    return out


def attention(
    q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, window=-1, *, causal=True, bias_BL=None, sink_H=None,
    cap=0.0,
):  # fmt: skip
    """There may be fewer key/value heads: each serves a group of consecutive query heads."""
    (B, L, H, _), shared = q_BLHK.shape, q_BLHK.shape[2] // k_BLHK.shape[2]
    out = np.zeros((B, L, H, v_BLHK.shape[-1]))
    for b, t, h in np.ndindex(B, L, H):
        seen = [s for s in range(L) if segment_ids_BL[b, s] == segment_ids_BL[b, t]]
        seen = [s for s in seen if s <= t or not causal]
        seen = [s for s in seen if window < 0 or abs(t - s) <= window]
        out[b, t, h] = one_query(
            q_BLHK[b, t, h], k_BLHK[b, seen, h // shared], v_BLHK[b, seen, h // shared],
            0.0 if bias_BL is None else bias_BL[b, seen], sink_H if sink_H is None else sink_H[h],
            cap,
        )  # fmt: skip
    return out


def one_query(q_K, k_SK, v_SK, bias_S=0.0, sink=None, cap=0.0):
    """Softmax attention over the S visible keys; `sink`: an extra logit without a value."""
    scores = np.float64(k_SK) @ np.float64(q_K) / np.sqrt(len(q_K))
    if cap:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores + bias_S)
    return weights @ np.float64(v_SK) / (weights.sum() + (0 if sink is None else np.exp(sink)))


def grouped_attention(q_BQHK, k_BKHK, v_BKHK, q_group_BQ, k_group_BK, same_BQK, relation, window):
    out = np.zeros(q_BQHK.shape)
    for b, t, h in np.ndindex(q_BQHK.shape[:3]):
        newest = q_group_BQ[b, t] - (relation == "last_closed")
        groups = range(0 if window < 0 else max(0, newest - window + 1), newest + 1)
        seen = [s for s, g in enumerate(k_group_BK[b]) if g in groups and same_BQK[b, t, s]]
        if seen:
            out[b, t, h] = one_query(q_BQHK[b, t, h], k_BKHK[b, seen, h], v_BKHK[b, seen, h])
    return out


def gated_delta(q_BLHK, k_BLHK, v_BLHV, log_alpha_BLH, beta_BLH, segment_ids_BL):
    """State V x K as in the paper: S = alpha S (I - beta k k') + beta v k', y = S q."""
    out = np.zeros(v_BLHV.shape)
    for b, h in np.ndindex(len(q_BLHK), q_BLHK.shape[2]):
        S = np.zeros((v_BLHV.shape[-1], q_BLHK.shape[-1]))
        for t in range(q_BLHK.shape[1]):
            if t and segment_ids_BL[b, t] != segment_ids_BL[b, t - 1]:
                S[:] = 0
            q, k, v = (np.float64(a[b, t, h]) for a in (q_BLHK, k_BLHK, v_BLHV))
            beta, alpha = float(beta_BLH[b, t, h]), np.exp(float(log_alpha_BLH[b, t, h]))
            S = alpha * S @ (np.eye(len(k)) - beta * np.outer(k, k)) + beta * np.outer(v, k)
            out[b, t, h] = S @ q
    return out


def mlstm(q_BLHK, k_BLHK, v_BLHV, igate_BLH, fgate_BLH, segment_ids_BL):
    """y = C q / (max(|n q|, 1) + e), C = f C + i v k', n = f n + i k; e = 1e-6 of the largest i."""
    out = np.zeros(v_BLHV.shape)
    for b, h in np.ndindex(len(q_BLHK), q_BLHK.shape[2]):
        for t in range(q_BLHK.shape[1]):
            if t == 0 or segment_ids_BL[b, t] != segment_ids_BL[b, t - 1]:
                C, n, largest = 0, 0, 0
            q, k, v = (np.float64(a[b, t, h]) for a in (q_BLHK, k_BLHK, v_BLHV))
            f, i = 1 / (1 + np.exp(-np.float64(fgate_BLH[b, t, h]))), np.exp(igate_BLH[b, t, h])
            C, n, q = f * C + i * np.outer(v, k), f * n + i * k, q / np.sqrt(len(q))
            largest = max(f * largest, i)
            out[b, t, h] = C @ q / (max(abs(n @ q), 1) + 1e-6 * largest)
    return out


def causal_conv_silu(x_BLC, weight_WC, bias_C, segment_ids_BL):
    out = np.zeros(x_BLC.shape)
    for b, t in np.ndindex(x_BLC.shape[:2]):
        out[b, t] = bias_C
        for back in range(min(len(weight_WC), t + 1)):
            if segment_ids_BL[b, t - back] == segment_ids_BL[b, t]:
                out[b, t] += np.float64(weight_WC[-1 - back]) * x_BLC[b, t - back]
    return out / (1 + np.exp(-out))


def rotary(x_BLHK, positions_BL, rotary_dim):
    """Rotate channels i and i + rotary_dim / 2 as real and imaginary part of a complex number."""
    half = rotary_dim // 2
    number = x_BLHK[..., :half] + 1j * np.float64(x_BLHK[..., half:rotary_dim])
    angle = positions_BL[..., None] * 1e4 ** (-np.arange(half) / max(half, 1))
    number = number * np.exp(1j * angle)[:, :, None]
    return np.concatenate([number.real, number.imag, x_BLHK[..., rotary_dim:]], axis=-1)


def ema(y_BMD, gate_BM, segment_ids_BM):
    out = np.zeros(y_BMD.shape)
    for b, m in np.ndindex(gate_BM.shape):
        same = m and segment_ids_BM[b, m] == segment_ids_BM[b, m - 1]
        before = out[b, m - 1] if same else 0.0
        gate = float(gate_BM[b, m])
        out[b, m] = gate * np.float64(y_BMD[b, m]) + (1 - gate) * before
    return out


def chunk(x_BLD, boundary_mask_BL, boundary_prob_BL, segment_ids_BL, capacity):
    """(states, segments, probabilities) of the positions where chunks start."""
    B, _, D = x_BLD.shape
    states, segments = np.zeros((B, capacity, D), np.float32), np.zeros((B, capacity), np.int32)
    probs = np.zeros((B, capacity), np.float32)
    for b in range(B):
        for m, t in enumerate(np.flatnonzero(boundary_mask_BL[b])):
            states[b, m], segments[b, m] = x_BLD[b, t], segment_ids_BL[b, t]
            probs[b, m] = boundary_prob_BL[b, t]
    return states, segments, probs


def dechunk(y_BMD, boundary_mask_BL, boundary_prob_BL, segment_ids_BL):
    """Loop over the row: boundaries update the EMA; other positions repeat the last value."""
    out = np.zeros((*boundary_mask_BL.shape, y_BMD.shape[-1]))
    for b, mask_L in enumerate(boundary_mask_BL):
        slot, smoothed, segment = 0, 0.0, None
        for t, is_boundary in enumerate(mask_L):
            if segment_ids_BL[b, t] != segment:
                smoothed, segment = 0.0, segment_ids_BL[b, t]
            if is_boundary:
                gate = np.clip(np.float64(boundary_prob_BL[b, t]), 1e-4, 1 - 1e-4)
                smoothed = gate * np.float64(y_BMD[b, slot]) + (1 - gate) * smoothed
                slot += 1
            out[b, t] = smoothed
    return out
