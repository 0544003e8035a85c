"""Training: Algorithm 1, and what it takes to run it for days."""
