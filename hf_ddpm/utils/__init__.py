"""What every room may import; nothing here imports from another room."""
