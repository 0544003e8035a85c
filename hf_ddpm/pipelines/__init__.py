"""The model as a pipeline of diffusers."""
