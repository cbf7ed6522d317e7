"""Segmentations, their metrics, plots and logs."""
