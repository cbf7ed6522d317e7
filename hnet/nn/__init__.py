"""Sequence mixers and stacks of layers. This package does not depend on `hnet.chunking`."""
