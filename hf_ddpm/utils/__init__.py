"""Helpers that all parts of the package may import; nothing here imports from the other parts."""
