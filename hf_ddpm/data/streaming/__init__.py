"""Streams of image datasets larger than memory and disk."""
