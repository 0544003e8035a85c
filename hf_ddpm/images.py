"""Pixels and their range: the only place that knows that uint8 becomes [-1, 1] and back.

Contracts: *bytes* are NCHW uint8, or uint16 where images are deep; *signed* images are NCHW float in [-1, 1], the
domain of the diffusion; *unit* images are NCHW float in [0, 1], what the stock pipelines return.
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

# What the numbers of channels are called in PIL.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Of grids. The gray differs from white as from black: the strokes of a digit end where its image ends.
BACKGROUND, GAP, FONT_SIZE = "#c8c8c8", 6, 13
LEAST_TILE = 64
MOST_CLASSES = 16
# Rest of an animation at its end.
LAST_MILLISECONDS = 1500

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
    return [grid(to_pil(image.unsqueeze(1)), scale=1, gap=1) for image in pixels]


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


def read_masks(masks: Any, count: int, size: tuple[int, int]) -> Tensor:
    """Returns masks, in whatever form they come, as truth values: true where they are white, or 1.

    Args:
        masks: One, or a list, of: opaque pictures of PIL, of which the brightness counts; arrays or tensors of truth
            values, floats in [0, 1] or integers, either 0 and 1 or up to 255; shapes `(H, W)`, `(N, H, W)`,
            `(N, 1, H, W)`, of arrays also `(H, W, 1)` and `(N, H, W, 1)`. Gray is white from one half of the range on.
        count: Number of images: there must be as many masks, or one for all.
        size: Height and width that they must have.

    Returns:
        The masks, bool, shape `(count, 1, H, W)`.

    Raises:
        ValueError: If there is none, or one has another form, size or range.
    """
    parts = [_read_masks(part, size) for part in (masks if isinstance(masks, list | tuple) else [masks])]
    total = sum(map(len, parts))
    if total not in (1, count) or total == 0:
        raise ValueError(f"{total} masks for {count} images are not allowed: one for all, or one per image")
    return torch.cat(parts).expand(count, 1, *size)


def _read_masks(masks: Any, size: tuple[int, int]) -> Tensor:
    if isinstance(masks, Image.Image):
        if masks.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ValueError(f"a mask of mode {masks.mode} is not allowed: a picture of mode 1, L, P or RGB")
        if masks.convert("RGBA").getextrema()[3] != (255, 255):
            raise ValueError("a mask with transparent pixels is not allowed: white where to fill, else black")
        masks = np.asarray(masks.convert("L"))
    is_array = isinstance(masks, np.ndarray) and masks.dtype.kind in "biuf"
    if not is_array and not (isinstance(masks, Tensor) and not masks.is_complex()):
        kind = f"{type(masks).__name__} of {masks.dtype}" if hasattr(masks, "dtype") else type(masks).__name__
        raise ValueError(f"masks as {kind} are not allowed: pictures of PIL, arrays or tensors of numbers")
    values = torch.tensor(masks) if is_array else masks.detach()
    if is_array and values.ndim in (3, 4) and values.shape[-3:] == (*size, 1):
        values = values[..., 0]
    elif values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (2, 3) or values.shape[-2:] != size:
        raise ValueError(f"masks of shape {tuple(masks.shape)} are not allowed: (N, 1, H, W) with (H, W) = {size}")
    values = values.reshape(-1, 1, *size)
    if not values.is_floating_point():
        values = values.to(torch.int64)  # of unsigned integers not every kind knows its largest
    top = 1 if values.is_floating_point() or not values.numel() or values.max() <= 1 else 255
    if not bool(((values >= 0) & (values <= top)).all()):
        kind = str(masks.dtype).removeprefix("torch.")
        raise ValueError(f"masks of {kind} with values outside [0, {top}] are not allowed: floats in [0, 1] or bytes")
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
    """Tiles images of one size, row by row, on light gray: no image touches another one or the border.

    Args:
        images: At least one image.
        columns: Images per row; a square by default.
        scale: Whole-number magnification; by default each image gets at least 64 pixels on its longer side.
        gap: Pixels around each image.
        column_labels: A label above each column.
        row_labels: A label to the left of each row.
        title: A line above all.

    Returns:
        The picture.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or math.ceil(LEAST_TILE / max(images[0].size))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(FONT_SIZE)
    line = math.ceil(FONT_SIZE * 1.5)
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
    """Tiles generated images, whose classes are those of `class_names` in turn.

    Args:
        pixels: Bytes, shape `(N, C, H, W)`.
        class_names: If there are at most 16 of them, each gets a labeled column.
        title: A line above all.

    Returns:
        The picture.
    """
    names = class_names[: len(pixels)] if 1 < len(class_names) <= MOST_CLASSES else ()
    return grid(to_pictures(pixels), columns=len(names) or None, column_labels=names, title=title)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, so that a reader of `path` never sees half a picture."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """Writes pictures of one size as a GIF or WebP, by the suffix of `path`, that rests at its last picture."""
    times = [milliseconds] * (len(frames) - 1) + [LAST_MILLISECONDS]
    with atomic_write(path) as partial:
        frames[0].save(partial, format=path.suffix[1:], save_all=True, append_images=frames[1:], duration=times, loop=0)
