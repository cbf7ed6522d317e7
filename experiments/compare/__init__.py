"""Every way to chunk at the same cost on the same bytes: `python -m experiments.compare`."""
