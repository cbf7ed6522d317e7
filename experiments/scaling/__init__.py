"""Bits per byte against compute over a ladder of sizes."""
