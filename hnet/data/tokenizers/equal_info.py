"""Equal-Info Windows (arXiv 2404.03626): windows of text that a byte model compresses to one token.

Arithmetic coding, started anew at each window, maps bytes to a number below N: each prefix of a
window owns an interval of numbers, of which one says that the window ends there and the others are
divided among its next bytes by their probability. A window ends before the first byte that gets no
number. So every token stands for fixed bytes, with about log2 N bits of information, and encoding
is a greedy longest match, lossless for any bytes. As in the paper the model sees only its window;
the stop numbers are ours, instead of its padding.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from hnet.data.tokenizers.lib import FORMAT

ORDER = 3
"""number of bytes that the counted model conditions on"""
LONGEST = 32
"""maximum number of bytes per window"""

NextBytes = Callable[[list[bytes]], np.ndarray]
"""Function from prefixes of windows to the probabilities of their next byte, (prefixes, 256)."""


def train_equal_info(texts: Sequence[bytes], size: int) -> str:
    """Content of the file of a vocabulary of `size` windows, from a model that counts bytes."""
    return windows_file(windows(Counts(texts), size))


def windows_file(found: Sequence[bytes]) -> str:
    """Content of the file of a vocabulary of windows."""
    return json.dumps({"format": FORMAT, "tokens": [w.hex() for w in found if len(w) > 1]})


def windows(next_bytes: NextBytes, size: int) -> list[bytes]:
    """All windows, at most `size`, in the order of their lengths; the 256 bytes come first."""
    found: list[bytes] = []
    level = [(b"", size)]
    while level:
        parents = [(prefix, n) for prefix, n in level if n > bool(prefix)]
        following = []
        tables = next_bytes([prefix for prefix, _ in parents]) if parents else ()
        for (prefix, n), prob_S in zip(parents, tables):
            for byte, share in enumerate(_shares(prob_S, n - 1 if prefix else n, not prefix)):
                if share:
                    following.append((prefix + bytes([byte]), share))
        found += [window for window, _ in following]
        level = [(window, n) for window, n in following if len(window) < LONGEST]
    return found


def _shares(prob_S: np.ndarray, n: int, at_least_one: bool) -> list[int]:
    """Divide n numbers among 256 bytes by their probabilities; roundings favour the likely ones."""
    order_S = np.argsort(prob_S, kind="stable")
    mass_S = np.cumsum(np.asarray(prob_S, np.float64)[order_S])
    spare = n - 256 if at_least_one else n
    ends_S = np.floor(mass_S / mass_S[-1] * spare + 1e-9).astype(np.int64)
    shares_S = np.full(256, int(at_least_one))
    shares_S[order_S] += np.diff(ends_S, prepend=0)
    return shares_S.tolist()


class Counts:
    """Byte model that counts: each order smooths towards the next lower one."""

    def __init__(self, texts: Sequence[bytes]):
        data = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
        self._keys, gram = [], np.zeros(len(data) + 1, np.int64)
        for order in range(ORDER + 1):
            gram = gram[: max(0, len(data) - order)] * 256 + data[order:]
            self._keys.append(np.unique(gram, return_counts=True))

    def __call__(self, prefixes: list[bytes]) -> np.ndarray:
        return np.stack([self._next(prefix) for prefix in prefixes])

    def _next(self, prefix: bytes) -> np.ndarray:
        prob_S = np.full(256, 1 / 256)
        for order in range(min(ORDER, len(prefix)) + 1):
            context = int.from_bytes(prefix[len(prefix) - order :]) * 256
            keys, counts = self._keys[order]
            lo, hi = np.searchsorted(keys, [context, context + 256])
            count_S = np.zeros(256)
            count_S[keys[lo:hi] - context] = counts[lo:hi]
            prob_S = (count_S + prob_S) / (count_S.sum() + 1)
        return prob_S
