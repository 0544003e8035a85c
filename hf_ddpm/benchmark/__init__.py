"""How fast it is, beside others: the same work with the same weights, timed in turns."""
