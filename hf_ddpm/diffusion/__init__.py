"""The one home of the mathematics: torch only, networks excluded, nats throughout."""

from hf_ddpm.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
