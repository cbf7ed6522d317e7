"""Byte-level sequence models with learned chunk boundaries, in JAX."""

import importlib

__all__ = ["HNetConfig", "HNetLM", "StageConfig", "load"]

# Names that need JAX are imported on first use: TensorBoard loads this package for its Boundaries
# tab, without JAX.
_LAZY = {
    "HNetConfig": "hnet.config",
    "HNetLM": "hnet.model",
    "StageConfig": "hnet.config",
    "load": "hnet.interop",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
