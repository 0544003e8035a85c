"""Converters of foreign checkpoints to the format of diffusers, one module per layout."""
