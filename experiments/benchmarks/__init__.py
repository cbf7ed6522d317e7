"""Benchmarks of this machine: training, input, decoding, routing, sweeps, logging."""
