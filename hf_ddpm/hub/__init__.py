"""Share models: model cards, pushes to the Hub, conversion of foreign checkpoints."""
