"""Conversion of weights to and from other formats."""

from hnet.interop.convert import convert, verify
from hnet.interop.load import load
from hnet.interop.official import from_official, to_official

__all__ = ["convert", "from_official", "load", "to_official", "verify"]
