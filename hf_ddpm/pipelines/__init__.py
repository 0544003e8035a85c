"""The diffusers pipeline: sampling, editing, latents, loading and sharing."""
