"""Sampling many images, exactly resumable."""
