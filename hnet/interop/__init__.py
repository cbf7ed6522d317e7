"""Conversion of weights to and from other formats."""

from hnet.interop.convert import convert, verify
from hnet.interop.load import load
from hnet.weights.official import from_official, to_official
from hnet.weights.sources import Source, resolve

__all__ = ["Source", "convert", "from_official", "load", "resolve", "to_official", "verify"]
