"""Split a network's output into prediction and variance; dynamic thresholding."""

import torch
from torch import Tensor

from hf_ddpm.diffusion.gaussian import LEARNED


def output_channels(channels: int, variance_type: str) -> int:
    """Return the number of output channels of a network: twice the image channels with a learned variance."""
    return channels * (2 if variance_type in LEARNED else 1)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into prediction and variance output; without extra channels, the latter is missing."""
    if output.shape[1] == channels:
        return output, None
    prediction, variance_output = output.chunk(2, dim=1)
    return prediction, variance_output


def dynamic_threshold(x_start: Tensor, ratio: float, max_value: float) -> Tensor:
    r"""Scale over-saturated images to [-1, 1] by dynamic thresholding (Saharia et al. 2022, Section 2.3).

    Each image is clipped to $[-s, s]$ and divided by $s$, where $s$ is the `ratio` quantile of its absolute pixel
    values, clamped to [1, `max_value`].

    Args:
        x_start: Estimates $\hat x_0$, float32 or float64, shape `(B, C, H, W)`.
        ratio: Quantile, in [0, 1].
        max_value: Upper limit of $s$, at least 1.

    Returns:
        Images in [-1, 1], same shape.
    """
    s = torch.quantile(x_start.abs().flatten(1), ratio, dim=1).clamp(1, max_value)
    s = s.view(-1, *[1] * (x_start.ndim - 1))
    return x_start.clamp(-s, s) / s
