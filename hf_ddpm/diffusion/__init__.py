"""The mathematics of diffusion: needs only torch, contains no networks, and measures in nats."""

from hf_ddpm.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
