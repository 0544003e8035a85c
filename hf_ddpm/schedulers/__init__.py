"""Schedulers for diffusers: DDPM and DDIM; checks of diffusers' own schedulers."""
