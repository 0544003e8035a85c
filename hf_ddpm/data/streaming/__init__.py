"""Streams of image data sets larger than memory and disk."""
