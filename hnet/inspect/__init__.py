"""What people look at: segmentations, their metrics, and every picture and log of them."""
