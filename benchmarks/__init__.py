"""Speed of this package compared with diffusers and denoising-diffusion-pytorch; not part of the wheel."""
