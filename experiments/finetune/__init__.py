"""Fine-tuning against training from scratch."""
