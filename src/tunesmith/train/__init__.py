"""The loop, and what it needs: optimizers, precision, checkpoints, processes."""
