"""Several learning rates of a small model trained at once in one process."""
