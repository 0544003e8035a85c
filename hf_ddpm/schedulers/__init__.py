"""The reverse process as a scheduler of diffusers."""
