"""Files of weights, official and our own: their tensors, names, configurations and sources."""
