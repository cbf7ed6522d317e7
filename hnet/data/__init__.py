"""From raw bytes to packed batches; independent of models."""

import importlib

from hnet.data.config import DataConfig

# Modules that read text are imported on first use, because configurations need only DataConfig.
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
