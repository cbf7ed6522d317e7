"""Target ratios that give every language the same number of chunks for the same text."""

import numpy as np

_ITERATIONS = 20_000


def equal_chunk_ratios(bytes_LR: np.ndarray, mean_ratio: float) -> np.ndarray:
    """N of each route (R,), float64, for a parallel text of L languages.

    bytes_LR: bytes of each language on each route, where all languages say the same. mean_ratio:
    bytes a chunk of the whole text, that is all bytes over all chunks.

    Chunks of language l are sum_r bytes_lr / N_r. They become equal in all languages if that is
    possible; languages that share a route share its rate, and are made as equal as that allows
    (the sum of chunks * log(chunks / mean) is least). Of all solutions it is the one nearest to
    equal rates, so that a route with few bytes, whose rate no language depends on, stays moderate;
    one without bytes has N = mean_ratio. The rates are found by multiplicative updates
    (simultaneous algebraic reconstruction in the logarithm), which keep them positive.
    """
    bytes_LR = np.asarray(bytes_LR, np.float64)
    total_R = bytes_LR.sum(axis=0)
    chunks = bytes_LR.sum() / mean_ratio  # wanted, of all languages together
    weight_LR = bytes_LR / np.maximum(total_R, 1.0)
    rate_R = np.full(bytes_LR.shape[1], 1 / mean_ratio)
    for _ in range(_ITERATIONS):
        change_R = np.log(chunks / len(bytes_LR) / (bytes_LR @ rate_R)) @ weight_LR
        rate_R = rate_R * np.exp(change_R)
        if np.abs(change_R).max() < 1e-12:
            break
    used_R = total_R > 0
    return np.where(used_R, (bytes_LR @ rate_R).sum() / chunks / rate_R, mean_ratio)
