"""Chains of known entropy: x_t is x_{t-k}, or with probability p the other symbol.

A model that learns the dependence reaches the entropy rate h(p), one that uses only frequencies 1
bit per symbol (arXiv 2404.08335). The second half of each chain is scored, with the first half as
context.
"""

import math
import random

import numpy as np

from hnet.suites.items import Report, Settings
from hnet.suites.scorer import Scorer

ORDERS = (1, 2, 3, 4)
SWITCH = 0.8
SYMBOLS = b"01"


def entropy(p: float) -> float:
    """Entropy in bits of a coin that shows heads with probability p."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


def chain(order: int, length: int, rng: random.Random, switch: float = SWITCH) -> bytes:
    """A chain of 0 and 1 in which each symbol depends only on the one `order` positions before."""
    bits = [rng.randint(0, 1) for _ in range(order)]
    while len(bits) < length:
        bits.append(bits[-order] ^ (rng.random() < switch))
    return bytes(SYMBOLS[b] for b in bits[:length])


def run(scorer: Scorer, settings: Settings) -> Report:
    rows, rate = [], entropy(SWITCH)
    for order in ORDERS:
        rng = random.Random(f"{settings.seed} markov {order}")
        chains = [chain(order, settings.max_bytes, rng) for _ in range(settings.items)]
        half = settings.max_bytes // 2
        nats = [s.logprobs[half:].mean(dtype=np.float64) for s in scorer.score(chains)]
        bits = -float(np.mean(nats)) / math.log(2)
        rows.append(
            {
                "order": order,
                "bits_per_symbol": bits,
                "entropy_rate": rate,
                "unigram_entropy": 1.0,
                "over_rate": bits - rate,
                "found": (1 - bits) / (1 - rate),
            }
        )
    return {"markov": rows}
