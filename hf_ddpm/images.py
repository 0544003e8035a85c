"""Convert images between bytes, [-1, 1], [0, 1] and PIL; draw grids and animations.

Terms: *bytes* are NCHW uint8, or uint16 for 16-bit images; *signed* images are NCHW floats in [-1, 1], the range of the
diffusion process; *unit* images are NCHW floats in [0, 1], the output of diffusers pipelines.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hf_ddpm.utils.files import atomic_write

# PIL modes by number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Layout of grids. The background is gray, so that the borders of both white and black images are visible.
BACKGROUND, GAP, FONT_SIZE = "#c8c8c8", 6, 13
LEAST_TILE = 64
MOST_CLASSES = 16
# Duration of the last frame of an animation.
LAST_MILLISECONDS = 1500

# Output types of pipelines; "numpy" is a synonym of "np" in diffusers.
OUTPUT_TYPES = ("pil", "np", "pt", "numpy")


def to_signed(pixels: Tensor, levels: int = 256) -> Tensor:
    """Convert bytes to signed images: 0 becomes -1, and 255 (65535 for uint16) becomes 1.

    Images with fewer evenly spaced values, such as the 17 of the digits, were rounded when stored as bytes. Each pixel
    is set to the nearest of `levels` values.

    Example:
        >>> to_signed(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([-1.0000, -0.6000,  1.0000])
    """
    brightest = 65535 if pixels.dtype == torch.uint16 else 255
    return (pixels.float() * ((levels - 1) / brightest)).round() / ((levels - 1) / 2) - 1


def to_unit(signed: Tensor) -> Tensor:
    """Convert signed images to unit images, clipped."""
    return (signed / 2 + 0.5).clamp(0, 1)


def to_bytes(unit: Tensor) -> Tensor:
    """Convert unit images to bytes, rounded to the nearest of 256 values."""
    return (unit * 255).round().to(torch.uint8)


def bytes_to_unit(pixels: Tensor) -> Tensor:
    """Convert bytes to unit images: 0 becomes 0, and 255 becomes 1."""
    return pixels / 255


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert bytes with 1, 3 or 4 channels to PIL images; other numbers of channels raise a `ValueError`."""
    check_picture(pixels.shape[1], "use arrays or tensors")
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def check_picture(channels: int, instead: str) -> None:
    """Raise a `ValueError` unless PIL images can have this number of channels; `instead` is the remedy."""
    if channels not in MODES:
        raise ValueError(f"PIL images cannot have {channels} channels: expected 1, 3 or 4; {instead}")


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Convert bytes with any number of channels to PIL images for display.

    Args:
        pixels: Bytes, shape `(N, C, H, W)`.

    Returns:
        A PIL image per image: gray, RGB or RGBA with 1, 3 or 4 channels, otherwise the channels in gray, side by side.
    """
    if pixels.shape[1] in MODES:
        return to_pil(pixels)
    return [grid(to_pil(image.unsqueeze(1)), scale=1, gap=1) for image in pixels]


def from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Convert a PIL image to a CHW uint8 array with 1, 3 or 4 channels."""
    array = np.asarray(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return array.reshape(*array.shape[:2], channels).transpose(2, 0, 1)


def as_output(unit: Tensor, output_type: str) -> Any:
    """Return unit images as PIL images (`pil`), as an NHWC array (`np`, `numpy`) or unchanged (`pt`)."""
    if output_type == "pil":
        return to_pil(to_bytes(unit))
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def read_signed(images: Any, shape: tuple[int, ...]) -> Tensor:
    """Convert PIL images, arrays or tensors to signed images.

    Args:
        images: One image or batch, or a list of them: PIL images; arrays, HWC or NHWC, of uint8 or of floats in [0, 1];
            tensors of floats in [-1, 1], CHW or NCHW.
        shape: The required shape `(C, H, W)`.

    Returns:
        The images, float32.

    Raises:
        ValueError: If there are no images, or one has another type, shape or range.
    """
    parts = [_read_signed(part, shape) for part in (images if isinstance(images, list | tuple) else [images])]
    for part in parts:
        if part.shape[1:] != shape:
            raise ValueError(f"images of shape {tuple(part.shape[1:])}: expected (C, H, W) = {shape}")
    if not sum(map(len, parts)):
        raise ValueError("images are empty: expected at least one")
    return torch.cat(parts)


def _read_signed(images: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(images, Image.Image):
        mode = MODES.get(shape[0])
        if images.mode != mode:
            expected = f"mode {mode}" if mode else f"an array or tensor with {shape[0]} channels"
            raise ValueError(f"PIL image of mode {images.mode}: expected {expected}")
        return to_signed(torch.tensor(from_pil(images, shape[0])).unsqueeze(0))
    if isinstance(images, np.ndarray) and images.ndim in (3, 4):
        pixels = torch.tensor(images if images.ndim == 4 else images[np.newaxis]).permute(0, 3, 1, 2)
        return to_signed(pixels) if pixels.dtype == torch.uint8 else _in_range(pixels, "array", 0) * 2 - 1
    if isinstance(images, Tensor) and images.ndim in (3, 4):
        return _in_range(images if images.ndim == 4 else images.unsqueeze(0), "tensor", -1)
    kind = (
        f"{type(images).__name__} of shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
    )
    raise ValueError(f"images of type {kind}: expected PIL images, arrays (N)HWC or tensors (N)CHW")


def _in_range(images: Tensor, kind: str, lowest: int) -> Tensor:
    if not images.is_floating_point() or not bool(((images >= lowest) & (images <= 1)).all()):
        values = images.double()  # not every unsigned integer type supports min
        dtype = str(images.dtype).removeprefix("torch.")
        values_range = f" with values from {values.min():g} to {values.max():g}" if images.numel() else ""
        raise ValueError(f"{kind} of {dtype}{values_range}: expected floats in [{lowest}, 1]")
    return images.float()


def read_masks(masks: Any, count: int, size: tuple[int, int]) -> Tensor:
    """Convert PIL images, arrays or tensors to boolean masks: true at white pixels, or 1.

    Args:
        masks: One mask or batch, or a list of them: opaque PIL images, converted to gray; arrays or tensors of
            booleans, of floats in [0, 1], or of integers, either 0 and 1 or up to 255. Shapes: `(H, W)`, `(N, H, W)`,
            `(N, 1, H, W)`, for arrays also `(H, W, 1)` and `(N, H, W, 1)`. Gray values of at least half of the maximum
            count as white.
        count: Number of images: there must be as many masks, or one mask for all.
        size: The required height and width.

    Returns:
        The masks, bool, shape `(count, 1, H, W)`.

    Raises:
        ValueError: If there are no masks, or one has another type, size or range.
    """
    parts = [_read_masks(part, size) for part in (masks if isinstance(masks, list | tuple) else [masks])]
    total = sum(map(len, parts))
    if total not in (1, count) or total == 0:
        raise ValueError(f"{total} masks for {count} images: expected one mask for all, or one per image")
    return torch.cat(parts).expand(count, 1, *size)


def _read_masks(masks: Any, size: tuple[int, int]) -> Tensor:
    if isinstance(masks, Image.Image):
        if masks.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ValueError(f"mask of mode {masks.mode}: expected a PIL image of mode 1, L, P or RGB")
        if masks.convert("RGBA").getextrema()[3] != (255, 255):
            raise ValueError("mask has transparent pixels: expected white where to fill, and black elsewhere")
        masks = np.asarray(masks.convert("L"))
    is_array = isinstance(masks, np.ndarray) and masks.dtype.kind in "biuf"
    if not is_array and not (isinstance(masks, Tensor) and not masks.is_complex()):
        kind = f"{type(masks).__name__} of {masks.dtype}" if hasattr(masks, "dtype") else type(masks).__name__
        raise ValueError(f"masks of type {kind}: expected PIL images, or arrays or tensors of numbers")
    values = torch.tensor(masks) if is_array else masks.detach()
    if is_array and values.ndim in (3, 4) and values.shape[-3:] == (*size, 1):
        values = values[..., 0]
    elif values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (2, 3) or values.shape[-2:] != size:
        raise ValueError(f"masks of shape {tuple(masks.shape)}: expected (N, 1, H, W) with (H, W) = {size}")
    values = values.reshape(-1, 1, *size)
    if not values.is_floating_point():
        values = values.to(torch.int64)  # not every unsigned integer type supports max
    top = 1 if values.is_floating_point() or not values.numel() or values.max() <= 1 else 255
    if not bool(((values >= 0) & (values <= top)).all()):
        kind = str(masks.dtype).removeprefix("torch.")
        raise ValueError(f"masks of {kind} with values outside [0, {top}]: expected floats in [0, 1] or bytes")
    return values >= top / 2


def grid(
    images: list[Image.Image],
    columns: int | None = None,
    scale: int | None = None,
    *,
    gap: int = GAP,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Draw images of one size as a grid, row by row, on light gray.

    Args:
        images: At least one image.
        columns: Images per row; by default the grid is about square.
        scale: Integer magnification; by default the longer side of each image gets at least 64 pixels.
        gap: Pixels around each image.
        column_labels: Labels above the columns.
        row_labels: Labels to the left of the rows.
        title: A line at the top.

    Returns:
        The grid as one PIL image.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or math.ceil(LEAST_TILE / max(images[0].size))
    width, height = (side * scale for side in images[0].size)
    font_size = max(FONT_SIZE, width // 8)  # readable when a large grid is shown in a small frame
    font = ImageFont.load_default(font_size)
    line = math.ceil(font_size * 1.5)
    labeled = max((math.ceil(font.getlength(label)) for label in column_labels), default=0)
    across, down = max(width, labeled) + gap, height + gap
    left = gap + max((math.ceil(font.getlength(label)) + gap for label in row_labels), default=0)
    head = line * bool(title) + gap
    top = head + line * bool(column_labels)
    size = left + columns * across, top + math.ceil(len(images) / columns) * down
    page = Image.new(images[0].mode, (max(size[0], math.ceil(font.getlength(title)) + 2 * gap), size[1]), BACKGROUND)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = image if scale == 1 else image.resize((width, height), Image.Resampling.NEAREST)
        page.paste(tile, (left + column * across + (across - gap - width) // 2, top + row * down))
    draw = ImageDraw.Draw(page)
    draw.text((gap, gap + line / 2), title, "black", font, anchor="lm")
    for column, label in enumerate(column_labels):
        draw.text((left + column * across + (across - gap) / 2, head + line / 2), label, "black", font, anchor="mm")
    for row, label in enumerate(row_labels):
        draw.text((left - gap, top + row * down + height / 2), label, "black", font, anchor="rm")
    return page


def sample_grid(pixels: Tensor, class_names: Sequence[str] = (), title: str = "") -> Image.Image:
    """Draw generated images as a grid.

    Args:
        pixels: Bytes, shape `(N, C, H, W)`.
        class_names: Classes of the images, repeated in turn. With 2 to 16 classes, each has a labeled column.
        title: A line at the top.

    Returns:
        The grid as one PIL image.
    """
    names = class_names[: len(pixels)] if 1 < len(class_names) <= MOST_CLASSES else ()
    return grid(to_pictures(pixels), columns=len(names) or None, column_labels=names, title=title)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Write PIL images of one size as a GIF or WebP (by the suffix of `path`); the last frame is shown longer."""
    times = [milliseconds] * (len(frames) - 1) + [LAST_MILLISECONDS]
    with atomic_write(path) as partial:
        frames[0].save(partial, format=path.suffix[1:], save_all=True, append_images=frames[1:], duration=times, loop=0)
