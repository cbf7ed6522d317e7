"""Routing per script against a single router and BPE."""
