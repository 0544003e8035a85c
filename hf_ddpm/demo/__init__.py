"""Demo of a model in the browser."""
