"""Byte-level sequence models that learn where to cut, in JAX."""

from hnet.config import HNetConfig, StageConfig
from hnet.model import HNetLM

__all__ = ["HNetConfig", "HNetLM", "StageConfig"]
