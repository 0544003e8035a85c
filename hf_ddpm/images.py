"""Pixels and their range: the only place that knows that uint8 becomes [-1, 1] and back.

Contracts: *bytes* are NCHW uint8, or uint16 where images are deep; *signed* images are NCHW float in [-1, 1], the
domain of the diffusion; *unit* images are NCHW float in [0, 1], what the stock pipelines return.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.utils.files import atomic_write

# What the numbers of channels are called in PIL.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# What pipelines return images as; "numpy" is a synonym of "np" in diffusers.
OUTPUT_TYPES = ("pil", "np", "pt", "numpy")


def to_signed(pixels: Tensor, levels: int = 256) -> Tensor:
    """Returns bytes as signed images: 0 is -1, and 255, or 65535 of uint16, is 1.

    Images that take only some evenly spaced values, such as the 17 of the digits, lie beside them by the rounding to
    bytes; they are moved onto the nearest of `levels` values.

    Example:
        >>> to_signed(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([-1.0000, -0.6000,  1.0000])
    """
    brightest = 65535 if pixels.dtype == torch.uint16 else 255
    return (pixels.float() * ((levels - 1) / brightest)).round() / ((levels - 1) / 2) - 1


def to_unit(signed: Tensor) -> Tensor:
    """Returns signed images, clipped, as unit images."""
    return (signed / 2 + 0.5).clamp(0, 1)


def to_bytes(unit: Tensor) -> Tensor:
    """Returns unit images, rounded to the nearest of the 256 levels, as bytes."""
    return (unit * 255).round().to(torch.uint8)


def bytes_to_unit(pixels: Tensor) -> Tensor:
    """Returns bytes as unit images: 0 is 0, and 255 is 1."""
    return pixels / 255


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Returns bytes with 1, 3 or 4 channels as PIL images; other numbers of channels raise a `ValueError`."""
    check_picture(pixels.shape[1], "arrays and tensors hold any number")
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def check_picture(channels: int, instead: str) -> None:
    """Raises a `ValueError` unless images of so many channels can be pictures of PIL; `instead` names the remedy."""
    if channels not in MODES:
        raise ValueError(f"images with {channels} channels are not pictures: expected 1, 3 or 4; {instead}")


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Returns bytes with any number of channels as pictures to look at.

    Args:
        pixels: Bytes, shape `(N, C, H, W)`.

    Returns:
        A picture per image: gray, RGB or RGBA with 1, 3 or 4 channels, else the channels in gray, side by side.
    """
    if pixels.shape[1] in MODES:
        return to_pil(pixels)
    return [grid(to_pil(image.unsqueeze(1)), scale=1) for image in pixels]


def from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Returns a PIL image, converted to 1, 3 or 4 channels, as a CHW uint8 array."""
    array = np.asarray(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return array.reshape(*array.shape[:2], channels).transpose(2, 0, 1)


def as_output(unit: Tensor, output_type: str) -> Any:
    """Returns unit images as pictures of PIL, as an NHWC array (`np`, `numpy`) or as they are (`pt`)."""
    if output_type == "pil":
        return to_pil(to_bytes(unit))
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def read_signed(images: Any, shape: tuple[int, ...]) -> Tensor:
    """Returns images, in whatever form they come, as signed images.

    Args:
        images: One, or a list, of: pictures of PIL; arrays, HWC or NHWC, of uint8 or of floats in [0, 1]; tensors of
            floats in [-1, 1], CHW or NCHW.
        shape: The shape `(C, H, W)` that they must have.

    Returns:
        The images, float32.

    Raises:
        ValueError: If there is none, or one has another form, shape or range.
    """
    parts = [_read_signed(part, shape) for part in (images if isinstance(images, list | tuple) else [images])]
    for part in parts:
        if part.shape[1:] != shape:
            raise ValueError(f"images of shape {tuple(part.shape[1:])} are not allowed: (C, H, W) = {shape}")
    if not sum(map(len, parts)):
        raise ValueError("there are no images")
    return torch.cat(parts)


def _read_signed(images: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(images, Image.Image):
        mode = MODES.get(shape[0])
        if images.mode != mode:
            wanted = mode or f"{shape[0]} channels have none, arrays or tensors are"
            raise ValueError(f"a picture of mode {images.mode} is not allowed: {wanted}")
        return to_signed(torch.tensor(from_pil(images, shape[0])).unsqueeze(0))
    if isinstance(images, np.ndarray) and images.ndim in (3, 4):
        pixels = torch.tensor(images if images.ndim == 4 else images[np.newaxis]).permute(0, 3, 1, 2)
        return to_signed(pixels) if pixels.dtype == torch.uint8 else _in_range(pixels, "array", 0) * 2 - 1
    if isinstance(images, Tensor) and images.ndim in (3, 4):
        return _in_range(images if images.ndim == 4 else images.unsqueeze(0), "tensor", -1)
    kind = (
        f"{type(images).__name__} of shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
    )
    raise ValueError(f"images as {kind} are not allowed: pictures of PIL, arrays (N)HWC or tensors (N)CHW")


def _in_range(images: Tensor, kind: str, lowest: int) -> Tensor:
    if not images.is_floating_point() or not bool(((images >= lowest) & (images <= 1)).all()):
        values = images.double()  # of unsigned integers not every kind knows its least
        reach = f"{images.dtype}, {values.min():g} to {values.max():g}" if images.numel() else f"{images.dtype}"
        raise ValueError(
            f"images in a {kind} of {reach.removeprefix('torch.')} are not allowed: floats in [{lowest}, 1]"
        )
    return images.float()


def grid(
    images: list[Image.Image],
    columns: int | None = None,
    scale: int | None = None,
    *,
    gap: int = 1,
    background: str = "black",
) -> Image.Image:
    """Tiles images of one size, row by row.

    Args:
        images: At least one image.
        columns: Images a row; a square by default.
        scale: Whole-number magnification; by default small images grow to about 64 pixels.
        gap: Pixels between them.
        background: What color these have.

    Returns:
        The picture.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or max(1, 64 // max(images[0].size))
    width, height = (side * scale + gap for side in images[0].size)
    size = columns * width - gap, math.ceil(len(images) / columns) * height - gap
    sheet = Image.new(images[0].mode, size, background)
    for i, image in enumerate(images):
        tile = image.resize((width - gap, height - gap), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, so that a reader of `path` never sees half a picture."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")
