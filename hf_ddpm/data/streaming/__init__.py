"""Image sets larger than memory and disk."""
