"""Hash of the model inputs of a batch, so that the logs of two runs can be compared."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_SALTS = (0x9E3779B9, 0x85EBCA6B)
_MASKED, _SEGMENT = 1 << 9, 1 << 10  # bits above the byte: loss mask, then segment id


def batch_hash(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Hash of input_ids, segment_ids, loss_mask and their positions in the batch, as two uint32.

    Takes NumPy or JAX arrays. The hash is a sum over positions, so on a mesh every device adds its
    own positions and the result does not depend on the number of devices or processes. The mixing
    function is the finaliser of MurmurHash3 (Appleby 2011).
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
    """Format a `batch_hash` as 16 hexadecimal digits."""
    return "".join(f"{int(lane):08x}" for lane in hashed)


def batch_fingerprint(batch: Mapping[str, np.ndarray]) -> str:
    """Fingerprint of a whole batch, computed on the host."""
    return fingerprint(batch_hash(batch))


def _mixed(x: Any) -> Any:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
