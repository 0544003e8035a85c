"""What a network says: which of its channels are what, and estimates of images that leave the range of images."""

import torch
from torch import Tensor

from hf_ddpm.diffusion.gaussian import LEARNED


def output_channels(channels: int, variance_type: str) -> int:
    """Returns the number of channels of a network for images of so many: twice that with a learned variance."""
    return channels * (2 if variance_type in LEARNED else 1)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Splits a network's output into its prediction and, where there are twice the channels, its variance output."""
    if output.shape[1] == channels:
        return output, None
    prediction, variance_output = output.chunk(2, dim=1)
    return prediction, variance_output


def dynamic_threshold(x_start: Tensor, ratio: float, max_value: float) -> Tensor:
    r"""Pulls over-saturated images back into [-1, 1] (Saharia et al. 2022, Section 2.3).

    With :math:`s` the `ratio` quantile of the absolute pixel values of an image, kept within [1, `max_value`], the
    image is clipped to :math:`[-s, s]` and divided by :math:`s`.

    Args:
        x_start: Estimated images, float32 or float64, shape `(B, C, H, W)`.
        ratio: Quantile in [0, 1].
        max_value: Largest allowed :math:`s`, at least 1.

    Returns:
        Images in [-1, 1], same shape.
    """
    s = torch.quantile(x_start.abs().flatten(1), ratio, dim=1).clamp(1, max_value)
    s = s.view(-1, *[1] * (x_start.ndim - 1))
    return x_start.clamp(-s, s) / s
