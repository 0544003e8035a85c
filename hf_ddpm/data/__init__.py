"""Images from anywhere, decoded once, as batches of bytes."""
