"""A part that runs a trained language model of its own, so it stands above the language model."""
