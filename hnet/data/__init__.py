"""Raw bytes in, packed batches out; knows nothing of models."""

import importlib

from hnet.data.config import DataConfig

# What reads text is imported when it is first asked for: configurations name data without it.
_LAZY = {
    "Corpus": "corpus",
    "Part": "corpus",
    "open_corpus": "corpus",
    "open_part": "corpus",
    "batch_fingerprint": "fingerprint",
    "batch_hash": "fingerprint",
    "BatchIterator": "pipeline",
    "eval_batches": "pipeline",
    "train_batches": "pipeline",
}

__all__ = ["DataConfig", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"hnet.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
