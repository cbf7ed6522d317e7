"""Target ratios that give every language the same number of chunks for the same text."""

import numpy as np

_ITERATIONS = 20_000


def equal_chunk_ratios(bytes_LR: np.ndarray, mean_ratio: float) -> np.ndarray:
    """N of each route (R,), float64, for a parallel text of L languages.

    bytes_LR: bytes per language and route of the same text in all languages. mean_ratio: bytes per
    chunk of the whole text, that is all bytes over all chunks.

    Language l has sum_r bytes_lr / N_r chunks. They are equal in all languages if that is possible.
    Languages that share a route share its rate; the numbers are then as equal as possible (the sum
    of chunks * log(chunks / mean) is minimal). Of all solutions the one nearest to equal rates is
    returned, so a route with few bytes, which hardly affects any language, has a moderate rate; a
    route without bytes has N = mean_ratio. The rates are found by multiplicative updates
    (simultaneous algebraic reconstruction in the logarithm), which keep them positive.
    """
    bytes_LR = np.asarray(bytes_LR, np.float64)
    total_R = bytes_LR.sum(axis=0)
    chunks = bytes_LR.sum() / mean_ratio  # target number of chunks of all languages together
    weight_LR = bytes_LR / np.maximum(total_R, 1.0)
    rate_R = np.full(bytes_LR.shape[1], 1 / mean_ratio)
    for _ in range(_ITERATIONS):
        change_R = np.log(chunks / len(bytes_LR) / (bytes_LR @ rate_R)) @ weight_LR
        rate_R = rate_R * np.exp(change_R)
        if np.abs(change_R).max() < 1e-12:
            break
    used_R = total_R > 0
    return np.where(used_R, (bytes_LR @ rate_R).sum() / chunks / rate_R, mean_ratio)
