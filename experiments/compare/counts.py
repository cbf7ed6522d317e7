"""A model of counts, which any network has to beat: the yardstick beside the table."""

import math
from collections.abc import Sequence

import numpy as np

from hnet.data import Part


def counts_bpb(train: Sequence[bytes], heldout: Sequence[bytes], order: int = 2) -> float:
    """Bits per byte of `heldout` under counts of `order` + 1 successive bytes in `train`.

    Witten-Bell smoothing: p_k(x | c) = (n(cx) + t(c) p_{k-1}(x | c')) / (n(c) + t(c)), where t(c)
    is the number of distinct bytes after context c, c' is c without its first byte, and p_{-1} is
    1 / 256 (Witten and Bell 1991, method C). Before a text stand zero bytes.
    """
    prob_N = np.full(sum(map(len, heldout)), 1 / 256)
    for k in range(order + 1):
        context, byte = _pairs(train, k)
        pairs, pair_counts = np.unique(context * 256 + byte, return_counts=True)
        contexts, first = np.unique(pairs // 256, return_index=True)
        total = np.add.reduceat(pair_counts, first)
        distinct = np.diff(np.append(first, len(pairs)))
        context, byte = _pairs(heldout, k)
        n_N = _looked_up(pairs, pair_counts, context * 256 + byte)
        total_N, distinct_N = (_looked_up(contexts, v, context) for v in (total, distinct))
        seen_N = total_N > 0
        mixed_N = (n_N + distinct_N * prob_N) / np.maximum(total_N + distinct_N, 1)
        prob_N = np.where(seen_N, mixed_N, prob_N)
    return float(-np.log2(prob_N).mean()) if len(prob_N) else math.nan


def same_share(part: Part, most: int) -> list[bytes]:
    """The beginning of each document, the same share of all: at most `most` bytes in total."""
    share = min(1.0, most / max(part.num_bytes, 1))
    return [part.begin(d, int(share * part.document_bytes(d))) for d in range(part.num_documents)]


def _pairs(texts: Sequence[bytes], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of the k bytes before each byte, and the byte, int64 (N,) each."""
    contexts, found = [], []
    for text in texts:
        padded = np.frombuffer(bytes(k) + text, np.uint8).astype(np.int64)
        contexts.append(sum(padded[i : i + len(text)] * 256 ** (k - 1 - i) for i in range(k)))
        found.append(padded[k:])
        if k == 0:
            contexts[-1] = np.zeros(len(text), np.int64)
    return np.concatenate(contexts), np.concatenate(found)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values of the sorted keys that are wanted; 0 for others."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
