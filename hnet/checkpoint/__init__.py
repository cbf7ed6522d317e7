"""Checkpoints: saving, manifests, verification, folders of steps."""
