"""Speed of this package beside diffusers and denoising-diffusion-pytorch; not part of the wheel."""
