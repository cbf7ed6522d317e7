"""Check that a cache fits into memory before allocating it."""

from collections.abc import Callable

import jax

from hnet.decode.prompts import MIN_LENGTH, length_bucket
from hnet.errors import ConfigError

USUAL = 1024  # positions of a cache for shorter texts, so that they share one compiled program
MAX_POSITIONS = (1 << 31) - 64  # int32 limit minus the null chunks that stages add to a row


def free_memory() -> int | None:
    """Free bytes on the default device; None if neither the device nor /proc reports it."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None


def check_rows(rows: int, length: int, vocab_size: int) -> None:
    """Raise ConfigError if the logits of a batch need more than the free memory."""
    needed, free = 4 * rows * length * vocab_size, free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"batch_size={rows}: {rows} rows of {length} positions need at least "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: use fewer or shorter rows"
        )


def positions(prompt_len: int, max_bytes: int, rows: int, cache_bytes: Callable[[int], int]) -> int:
    """Number of cache positions for prompts of up to `prompt_len` bytes and their continuations.

    A power of two, and at least `USUAL` if that fits. The cost of a step depends on the positions
    in use, not on these.

    cache_bytes: function from a number of positions to the bytes of the cache; the cache is built
    in place, so this is all it needs. Raises ConfigError if that exceeds the free memory.
    """
    room, free = min(length_bucket(prompt_len + max_bytes), MAX_POSITIONS), free_memory()
    if room < USUAL and (free is None or cache_bytes(USUAL) <= free):
        return USUAL
    needed = cache_bytes(room)
    if free is None or needed <= free:
        return room
    fits = room
    while fits > MIN_LENGTH and cache_bytes(fits) > free:
        fits = length_bucket(fits) // 2
    most = fits - prompt_len
    remedy = f"use {most} or less" if most > 0 else "use a shorter prompt"
    raise ConfigError(
        f"sampling.max_bytes={max_bytes}: a cache for {rows} x {room} bytes needs "
        f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: {remedy}"
        + (", or fewer rows together (batch_size)" if rows > 1 else "")
    )
