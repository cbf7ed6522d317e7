"""Chunking systems against the numbers of their own code (tests/golden/family)."""
