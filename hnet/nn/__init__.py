"""Sequence mixers and stacks of them. Nothing in here knows about chunks."""
