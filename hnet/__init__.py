"""Byte-level sequence models that learn where to cut, in JAX."""

import importlib

__all__ = ["HNetConfig", "HNetLM", "StageConfig", "load"]

# What needs JAX is imported when it is first asked for: TensorBoard loads this package for its
# Boundaries tab, and starts without JAX.
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
