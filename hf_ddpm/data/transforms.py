"""Decode and resize an image to the training format: size, channels and bit depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from hf_ddpm.config import DataConfig
from hf_ddpm.data.arrays import read_array
from hf_ddpm.data.pictures import image_array, open_image
from hf_ddpm.images import MODES, from_pil

# Modes with more than 8 bits per channel, which PIL's conversions clip to 255.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageFormat:
    """Size, channels and bit depth of decoded images.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        channels: 1, 3 or 4; any other number for arrays with exactly that many channels.
        crop: Crop of images of another aspect ratio, after resizing: at the `center`, or at a new `random` position
            each time the image is used.
        deep: If true, pixels have 16 bits. Several channels then need arrays, because PIL reads color with 8 bits.
        enlarge: If true, upscale smaller images instead of raising an error.
        value_range: The values of black and white in arrays and image files of floats.
        background: Color behind transparent pixels of image files; unused with 4 channels.
    """

    height: int
    width: int
    channels: int
    crop: Literal["center", "random"] = "center"
    deep: bool = False
    enlarge: bool = False
    value_range: tuple[float, ...] | None = None
    background: str = "white"

    @classmethod
    def of(cls, data: DataConfig) -> "ImageFormat":
        """Return the format given by the options of a dataset."""
        value_range = None if data.value_range is None else tuple(map(float, data.value_range))
        deep = data.levels > 256
        return cls(*data.size, data.channels, data.crop, deep, data.enlarge, value_range, data.background)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape `(C, H, W)` of an image."""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> type[np.generic]:
        """The type of pixels: uint8, or uint16 if `deep`."""
        return np.uint16 if self.deep else np.uint8

    @property
    def white(self) -> int:
        """The largest pixel value."""
        return 65535 if self.deep else 255


def fit(row: dict[str, Any] | None, image_format: ImageFormat, notes: list[str] | None = None) -> np.ndarray:
    """Decode an image, turn it upright, put it on the background (unless there are 4 channels) and resize it.

    Args:
        row: The image as stored by `datasets`: `bytes`, or the `path` of a file.
        image_format: Format of the result.
        notes: List to which lines about lost information, such as bit depth, are added.

    Returns:
        Pixels, `image_format.dtype`, shape `(C, H, W)`; with random crops H or W may be larger, for `crop_at`.

    Raises:
        Exception: If the image is missing, unreadable (PIL raises many types), too small or of a higher bit depth.
    """
    if row is None or (row["bytes"] is None and row["path"] is None):
        raise ValueError("image is missing")
    array = read_array(row)
    if array is not None:
        return _fit_array(_channels_last(array, image_format.channels), image_format)
    return _fit_image(open_image(row), image_format, [] if notes is None else notes)


def crop_at(pixels: np.ndarray, image_format: ImageFormat, position: Sequence[float]) -> np.ndarray:
    """Crop an image.

    Args:
        pixels: Shape `(C, H, W)`, at least as large as `image_format`.
        image_format: The size of the result.
        position: Crop position (down, right) as fractions of the largest offset, in [0, 1). Uniform fractions make all
            positions equally likely.

    Returns:
        A view of the pixels, of shape `image_format.shape`.
    """
    top = int(position[0] * (pixels.shape[1] - image_format.height + 1))
    left = int(position[1] * (pixels.shape[2] - image_format.width + 1))
    return pixels[:, top : top + image_format.height, left : left + image_format.width]


def as_bytes(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Return an image with 1, 3 or 4 channels of 8 bits, on a background of one color unless there are 4 channels.

    Raises:
        ValueError: If the image has more bits per channel, or `channels` is another number.
    """
    # Always before resizing: palette indices must not be interpolated.
    if channels not in MODES:
        raise ValueError(
            f"image of mode {image.mode} does not have --channels {channels}; expected an array (.npy, .npz) of "
            f"{channels} channels, or a TIFF of {channels} gray pages"
        )
    if image.mode.startswith(DEEP_MODES):
        raise ValueError(
            f"image has more than 8 bits per channel (mode {image.mode}), which {MODES[channels]} would clip; "
            "use --levels 65536 with --channels 1 to keep them"
        )
    if channels < 4 and image.has_transparency_data:
        # Transparent pixels have arbitrary colors in the file.
        page = Image.new("RGBA", image.size, background)
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _fit_image(image: Image.Image, image_format: ImageFormat, notes: list[str]) -> np.ndarray:
    channels, deep, background = image_format.channels, image_format.deep, image_format.background
    _check_size(image.width, image.height, image_format)
    if image.info["depth_lost"]:
        if deep:
            raise ValueError("image has 16-bit color or transparency, which PIL reads with 8 bits; expected an array")
        notes.append("16 bits per channel are read as 8")
    array = image_array(image, channels, deep, background)
    if array is not None:
        return _fit_array(array, image_format)
    if getattr(image, "n_frames", 1) > 1:
        notes.append("only the first frame or page is read")
    if not deep:
        return from_pil(_resize(as_bytes(image, channels, background), image_format), channels)
    if channels > 1:
        raise ValueError(
            f"PIL reads color with 8 bits per channel; expected an array or a TIFF of {channels} pages for 16 bits"
        )
    return _fit_array(np.asarray(as_bytes(image, 1, background))[..., np.newaxis], image_format)


def _fit_array(array: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    """Resize an array of shape `(H, W, C)`, or `(H, W, 1)` of a grayscale image, and convert it to the format."""
    _check_size(array.shape[1], array.shape[0], image_format)
    values = _as_values(array, image_format)
    planes = [Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(values.shape[2])]
    if len(planes) < image_format.channels:
        planes = _in_color(planes[0], image_format)
    pixels = np.stack([np.asarray(_resize(plane, image_format)) for plane in planes])
    if pixels.dtype == np.uint8:
        return pixels
    return pixels.round().clip(0, image_format.white).astype(image_format.dtype)


def _channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """Return an image of shape `(H, W, C)`, `(C, H, W)` or (with one channel) `(H, W)` as `(H, W, C)`."""
    if array.ndim == 2 and channels == 1:
        return array[..., np.newaxis]
    if array.ndim == 3 and array.shape[2] == channels:
        return array
    if array.ndim == 3 and array.shape[0] == channels:
        return array.transpose(1, 2, 0)
    raise ValueError(
        f"array of shape {array.shape} does not have --channels {channels}; expected (H, W, {channels}) or"
        f" ({channels}, H, W){' or (H, W)' if channels == 1 else ''}"
    )


def _as_values(array: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    """Return an array as uint8 if 8 bits suffice, otherwise as float32 in [0, white]."""
    deep, dtype = image_format.deep, array.dtype
    if dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "f":
        array = _in_unit_range(array, image_format.value_range) * image_format.white
    elif array.dtype == np.uint8:
        return array.astype(np.float32) * 257 if deep else array
    elif dtype.kind != "u" or dtype.itemsize > 2:
        raise ValueError(f"array of dtype {dtype} is not supported; expected uint8, uint16, bool or floats")
    elif not deep:
        raise ValueError(f"array has more than 8 bits per channel (dtype {dtype}); use --levels 65536 to keep them")
    return array.astype(np.float32)


def _in_unit_range(array: np.ndarray, value_range: Sequence[float] | None) -> np.ndarray:
    """Map floats from a range to [0, 1]."""
    if value_range is None:
        raise ValueError(
            f"image has floats (dtype {array.dtype}); use --value_range LOW HIGH to set the values of black and white"
        )
    low, high = value_range
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("image has values that are not finite")
    if values.size and not low <= values.min() <= values.max() <= high:
        raise ValueError(f"values from {values.min():g} to {values.max():g} are outside --value_range {low:g} {high:g}")
    return (values - low) / (high - low)


def _in_color(gray: Image.Image, image_format: ImageFormat) -> list[Image.Image]:
    """Return a gray plane as 3 color planes; with 4 channels, an opaque alpha plane is added."""
    channels = image_format.channels
    if channels not in (3, 4):
        raise ValueError(
            f"grayscale image does not have --channels {channels}; expected an array of {channels} channels, or a TIFF "
            f"of {channels} pages"
        )
    return [gray, gray, gray, *[Image.new(gray.mode, gray.size, image_format.white)] * (channels - 3)]


def _check_size(width: int, height: int, image_format: ImageFormat) -> None:
    """Raise a `ValueError` if an image is too small, unless small images are upscaled."""
    _, rows, columns = image_format.shape
    if not image_format.enlarge and (width < columns or height < rows):
        raise ValueError(f"size {height}x{width} is smaller than the resolution {rows}x{columns} (height x width)")


def _resize(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    size = image_format.width, image_format.height
    if image.size == size:
        return image
    if image_format.crop == "center":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = max(size[0] / image.width, size[1] / image.height)
    scaled = [max(target, round(side * scale)) for target, side in zip(size, image.size, strict=True)]
    return image.resize((scaled[0], scaled[1]), Image.Resampling.LANCZOS)
