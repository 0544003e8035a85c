"""Pixels and their range: the only place that knows that uint8 becomes [-1, 1] and back.

Contracts: *bytes* are NCHW uint8, or uint16 where images are deep; *signed* images are NCHW float in [-1, 1], the
domain of the diffusion; *unit* images are NCHW float in [0, 1], what the stock pipelines return.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.files import written_whole

# What the numbers of channels are called in PIL.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_signed(pixels: Tensor, levels: int = 256) -> Tensor:
    """Returns bytes as signed images: 0 is -1, and 255, or 65535 of uint16, is 1.

    Images that take only some evenly spaced values, such as the 17 of the digits, lie beside them by the rounding to
    bytes; they are moved onto the nearest of `levels` values.
    """
    brightest = 65535 if pixels.dtype == torch.uint16 else 255
    return (pixels.float() * ((levels - 1) / brightest)).round() / ((levels - 1) / 2) - 1


def to_unit(signed: Tensor) -> Tensor:
    """Returns signed images, clipped, as unit images."""
    return (signed / 2 + 0.5).clamp(0, 1)


def to_bytes(unit: Tensor) -> Tensor:
    """Returns unit images, rounded to the nearest of the 256 levels, as bytes."""
    return (unit * 255).round().to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Returns bytes with 1, 3 or 4 channels as PIL images; other numbers of channels raise a `ValueError`."""
    if pixels.shape[1] not in MODES:
        raise ValueError(f"{pixels.shape[1]} channels are no picture: one of {', '.join(map(str, MODES))} is")
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Returns a PIL image, converted to 1, 3 or 4 channels, as a CHW uint8 array."""
    array = np.asarray(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return array.reshape(*array.shape[:2], channels).transpose(2, 0, 1)


def grid(images: list[Image.Image], columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Tiles images of one size, row by row, with a pixel between them.

    Args:
        images: At least one image.
        columns: Images a row; a square by default.
        scale: Whole-number magnification; by default small images grow to about 64 pixels.

    Returns:
        The picture.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or max(1, 64 // max(images[0].size))
    width, height = (side * scale + 1 for side in images[0].size)
    sheet = Image.new(images[0].mode, (columns * width - 1, math.ceil(len(images) / columns) * height - 1))
    for i, image in enumerate(images):
        tile = image.resize((width - 1, height - 1), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, so that a reader of `path` never sees half a picture."""
    with written_whole(path) as partial:
        picture.save(partial, format="PNG")
