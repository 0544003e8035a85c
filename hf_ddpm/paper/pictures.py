"""Pictures of many images with labels, and distances in pixels."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hf_ddpm.images import grid, to_bytes, to_pictures

FONT_SIZE = 13
MARGIN = 6
GAP = 3


def rmse(unit: Tensor, other: Tensor) -> float:
    """Returns the root mean squared difference of unit images on the scale [0, 255]."""
    return 255 * (unit - other).square().mean().sqrt().item()


def variety(unit: Tensor) -> float:
    """Returns the root mean squared difference, on the scale [0, 255], of two images out of several.

    Args:
        unit: Unit images, shape `(groups, N, C, H, W)`, `N` at least 2; the two are of one group.
    """
    # Over all pairs the mean of (x - y)^2 is twice the unbiased variance.
    return 255 * (2 * unit.var(dim=1)).mean().sqrt().item()


def sheet(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str]) -> Image.Image:
    """Draws images in rows, with labels.

    Args:
        rows: Labels and unit images, shape `(len(columns), C, H, W)`.
        columns: Labels.

    Returns:
        The picture.
    """
    pictures = to_pictures(to_bytes(torch.cat([images for _, images in rows]).clamp(0, 1)))
    tiles = grid(pictures, columns=len(columns), gap=GAP, background="white")
    width, height = (tiles.width + GAP) // len(columns), (tiles.height + GAP) // len(rows)
    font = ImageFont.load_default(FONT_SIZE)
    left = max(round(font.getlength(label)) for label, _ in rows) + 2 * MARGIN
    top = FONT_SIZE + 2 * MARGIN
    page = Image.new("RGB" if tiles.mode == "L" else tiles.mode, (left + tiles.width, top + tiles.height), "white")
    page.paste(tiles, (left, top))
    draw = ImageDraw.Draw(page)
    for number, label in enumerate(columns):
        draw.text((left + number * width + (width - GAP) / 2, top / 2), label, "black", font, anchor="mm")
    for number, (label, _) in enumerate(rows):
        draw.text((left - MARGIN, top + number * height + (height - GAP) / 2), label, "black", font, anchor="rm")
    return page
