"""Checkpoints of others, brought to the format of diffusers: a file for each layout, and what they share."""
