"""The equations as plain loops in float64: slow, and short enough to be checked by reading."""

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


def attention(q_BLHK, k_BLHK, v_BLHK, segment_ids_BL, window):
    out = np.zeros(v_BLHK.shape)
    for b, t, h in np.ndindex(q_BLHK.shape[:3]):
        first = 0 if window < 0 else max(0, t - window)
        seen = [s for s in range(first, t + 1) if segment_ids_BL[b, s] == segment_ids_BL[b, t]]
        scores = np.float64(k_BLHK[b, seen, h]) @ np.float64(q_BLHK[b, t, h])
        weights = np.exp(scores / np.sqrt(q_BLHK.shape[-1]))
        out[b, t, h] = weights @ v_BLHK[b, seen, h] / weights.sum()
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
    """Channels i and i + rotary_dim / 2 as the real and imaginary part of one number, turned."""
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
    """Walks the row: a boundary takes in its chunk's output, other positions repeat the last."""
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
