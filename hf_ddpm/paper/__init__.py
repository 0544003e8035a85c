"""The figures and tables of the paper, from a trained model."""
