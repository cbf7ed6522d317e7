"""Sweeps: points of a search space, their storage, training and results."""
