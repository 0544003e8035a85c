"""Training: Algorithm 1, checkpoints, precision, memory and progress."""
