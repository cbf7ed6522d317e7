"""A number for what a batch feeds the model, so that the logs of two runs can be compared."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_SALTS = (0x9E3779B9, 0x85EBCA6B)
_MASKED, _SEGMENT = 1 << 9, 1 << 10  # above the byte: whether it is scored, and its segment


def batch_hash(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two uint32 of input_ids, segment_ids and loss_mask, and where each stands in the batch.

    Takes arrays of NumPy or JAX. It is a sum over positions, so on a mesh every device adds its
    own, and the number of devices or processes changes nothing. The mixing is the finaliser of
    MurmurHash3 (Appleby 2011).
    """
    ids_BL = batch["input_ids"].astype(np.uint32)
    scored_BL = batch["loss_mask"].astype(np.uint32)
    word_BL = ids_BL + scored_BL * np.uint32(_MASKED)
    word_BL = word_BL + batch["segment_ids"].astype(np.uint32) * np.uint32(_SEGMENT)
    place_BL = np.arange(ids_BL.size, dtype=np.uint32).reshape(ids_BL.shape)
    return tuple(
        _mixed(_mixed(word_BL ^ np.uint32(salt)) + place_BL).sum(dtype=np.uint32) for salt in _SALTS
    )


def fingerprint(hashed: Any) -> str:
    """A `batch_hash` as 16 hexadecimal digits."""
    return "".join(f"{int(lane):08x}" for lane in hashed)


def batch_fingerprint(batch: Mapping[str, np.ndarray]) -> str:
    """Hash of a whole batch on the host."""
    return fingerprint(batch_hash(batch))


def _mixed(x: Any) -> Any:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
