"""Weights to and from other formats."""

from hnet.interop.official import from_official, to_official

__all__ = ["from_official", "to_official"]
