"""The order of rows in a run: a mixture schedule, and a permutation of each epoch of a stream."""

from functools import lru_cache

import numpy as np

from hnet.errors import ConfigError

_PERIOD = 10_000  # number of slots in the mixture schedule: weights are exact to 1/10,000


class RowOrder:
    """Map from slot i >= 0 of the run to a stream and a row of it.

    A fixed periodic schedule gives the stream of each slot; the slots of a stream are as evenly
    spaced as the weights allow (a single stream has every slot). The rows of a stream have a new
    permutation in each of its epochs.
    """

    def __init__(self, num_rows: list[int], weights: tuple[float, ...], seed: int):
        if max(num_rows) >= 2**32:
            raise ConfigError(
                f"data.files fill {max(num_rows)} rows, more than the 2**32 that can be shuffled: "
                "use a larger data.seq_len or fewer files"
            )
        if seed < 0:
            raise ConfigError(f"seed={seed}: use 0 or more")
        self._num_rows = num_rows
        self._seed = seed
        self._schedule = _schedule(weights or (1.0,))

    def __call__(self, slot: int) -> tuple[int, int]:
        """(stream, row of it) at a slot."""
        from grain.experimental import index_shuffle

        stream_P, rank_P, quota_S = self._schedule
        period, i = divmod(slot, _PERIOD)
        stream = int(stream_P[i])
        nth = period * int(quota_S[stream]) + int(rank_P[i])
        epoch, i = divmod(nth, self._num_rows[stream])
        seed = _epoch_seed(self._seed, stream, epoch)
        last = self._num_rows[stream] - 1
        return stream, index_shuffle(i, max_index=last, seed=seed, rounds=4)


@lru_cache(maxsize=256)
def _epoch_seed(seed: int, stream: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, stream, epoch)).generate_state(1)[0])


def _schedule(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(stream of each slot, rank of the slot within its stream, number of slots per stream).

    The number of slots per stream is its share of a period, rounded by the largest remainder method
    so that the sum is the period. The n-th slot of a stream is placed as near as possible to the
    middle of the n-th of equal intervals.
    """
    share_S = np.asarray(weights, np.float64) / sum(weights) * _PERIOD
    quota_S = np.floor(share_S).astype(np.int64)
    missing = _PERIOD - int(quota_S.sum())
    quota_S[np.argsort(quota_S - share_S, kind="stable")[:missing]] += 1
    if not quota_S.all():
        raise ConfigError(f"data.weights={weights}: a share below 1/{_PERIOD} cannot be kept")
    stream = np.repeat(np.arange(len(weights)), quota_S)
    rank = np.concatenate([np.arange(q) for q in quota_S])
    order = np.argsort((rank + 0.5) / quota_S[stream], kind="stable")
    return stream[order], rank[order], quota_S
