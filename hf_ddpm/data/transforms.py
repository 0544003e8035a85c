"""One encoded image to an array of the size, channels and depth that a network is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from hf_ddpm.config import DataConfig
from hf_ddpm.data.arrays import read_array
from hf_ddpm.data.pictures import open_picture, picture_array
from hf_ddpm.images import MODES, from_pil

# More than 8 bits a channel: PIL would clip these to 255 when it converts.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageFormat:
    """Size, channels and depth of decoded images.

    Attributes:
        height: Rows of pixels.
        width: Columns of pixels.
        channels: 1, 3 or 4; any other number for arrays of exactly so many channels.
        crop: What is cut from an image of another shape, once its smaller side fits: the `center`, or, anew each time
            the image is seen, a place at `random`.
        deep: Whether pixels have 16 bits; with several channels from arrays only: PIL reads color with 8.
        enlarge: Whether images that are smaller are scaled up; they are refused otherwise.
        value_range: The floats that become black and white, for arrays and pictures of floats.
        background: Color behind transparent pixels of pictures, unless there are 4 channels.
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
        """Returns the format that the options of a data set ask for."""
        value_range = None if data.value_range is None else tuple(map(float, data.value_range))
        deep = data.levels > 256
        return cls(*data.size, data.channels, data.crop, deep, data.enlarge, value_range, data.background)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape `(C, H, W)` of an image."""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> type[np.generic]:
        """The type of pixels: uint8, or uint16 where images are deep."""
        return np.uint16 if self.deep else np.uint8

    @property
    def white(self) -> int:
        """The brightest pixel."""
        return 65535 if self.deep else 255


def fit(row: dict[str, Any] | None, image_format: ImageFormat, notes: list[str] | None = None) -> np.ndarray:
    """Decodes an image and fits it: turned as its camera says, put on the background unless there are 4 channels.

    Args:
        row: The image as `datasets` keeps it: `bytes`, or the `path` of a file.
        image_format: Format of the result.
        notes: Gets a line on what is lost, such as bits of color.

    Returns:
        Pixels, `image_format.dtype`, shape `(C, H, W)`; with random crops one of H and W may be larger, for `crop_at`.

    Raises:
        Exception: If it is missing, unreadable (whatever PIL raises), smaller than asked for or deeper.
    """
    if row is None or (row["bytes"] is None and row["path"] is None):
        raise ValueError("there is none")
    array = read_array(row)
    if array is not None:
        return _fit_array(_channels_last(array, image_format.channels), image_format)
    return _fit_picture(open_picture(row), image_format, [] if notes is None else notes)


def crop_at(pixels: np.ndarray, image_format: ImageFormat, place: Sequence[float]) -> np.ndarray:
    """Cuts an image of the asked size out of a larger one.

    Args:
        pixels: Shape `(C, H, W)`, at least as large as `image_format`.
        image_format: The size.
        place: How far down and right the cut is, of what is spare, in [0, 1): all places are equally likely if they
            are uniform.

    Returns:
        A view of the pixels, of shape `image_format.shape`.
    """
    top = int(place[0] * (pixels.shape[1] - image_format.height + 1))
    left = int(place[1] * (pixels.shape[2] - image_format.width + 1))
    return pixels[:, top : top + image_format.height, left : left + image_format.width]


def as_bytes(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Returns an image of 1, 3 or 4 channels of 8 bits, on a background of one color unless there are 4.

    Raises:
        ValueError: If it has more bits, or is to have another number of channels.
    """
    # Always before resizing: the indices of a palette must not be interpolated.
    if channels not in MODES:
        raise ValueError(
            f"a picture of mode {image.mode} has no {channels} channels: channels={channels} needs arrays (.npy, .npz)"
            f" of {channels} channels, or a TIFF of {channels} gray pages"
        )
    if image.mode.startswith(DEEP_MODES):
        raise ValueError(
            f"it has more than 8 bits a channel (mode {image.mode}), which {MODES[channels]} would clip:"
            " levels=65536 with channels=1 keeps them"
        )
    if channels < 4 and image.has_transparency_data:
        # Behind transparent pixels files hold arbitrary colors.
        page = Image.new("RGBA", image.size, background)
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _fit_picture(image: Image.Image, image_format: ImageFormat, notes: list[str]) -> np.ndarray:
    channels, deep, background = image_format.channels, image_format.deep, image_format.background
    _check_size(image.width, image.height, image_format)
    if image.info["depth_lost"]:
        if deep:
            raise ValueError("it has color or transparency with 16 bits, which PIL reads as 8: use an array")
        notes.append("16 bits per channel are read as 8")
    array = picture_array(image, channels, deep, background)
    if array is not None:
        return _fit_array(array, image_format)
    if getattr(image, "n_frames", 1) > 1:
        notes.append("only the first frame or page is read")
    if not deep:
        return from_pil(_resize(as_bytes(image, channels, background), image_format), channels)
    if channels > 1:
        raise ValueError(f"color with 16 bits needs arrays, or a TIFF of {channels} pages: PIL reads it with 8")
    return _fit_array(np.asarray(as_bytes(image, 1, background))[..., np.newaxis], image_format)


def _fit_array(array: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    """Fits an array of shape `(H, W, C)`, or `(H, W, 1)` from a gray picture."""
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
    """Returns an image of shape `(H, W, C)`, `(C, H, W)` or, of one channel, `(H, W)` as `(H, W, C)`."""
    if array.ndim == 2 and channels == 1:
        return array[..., np.newaxis]
    if array.ndim == 3 and array.shape[2] == channels:
        return array
    if array.ndim == 3 and array.shape[0] == channels:
        return array.transpose(1, 2, 0)
    raise ValueError(
        f"array of shape {array.shape} does not have channels={channels}: expected (H, W, {channels}) or"
        f" ({channels}, H, W){' or (H, W)' if channels == 1 else ''}"
    )


def _as_values(array: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    """Returns an array as uint8 where bytes suffice, else as float32 in [0, white]."""
    deep, dtype = image_format.deep, array.dtype
    if dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "f":
        array = _in_unit_range(array, image_format.value_range) * image_format.white
    elif array.dtype == np.uint8:
        return array.astype(np.float32) * 257 if deep else array
    elif dtype.kind != "u" or dtype.itemsize > 2:
        raise ValueError(f"dtype {dtype} is not supported: expected uint8, uint16, bool, or floats")
    elif not deep:
        raise ValueError(f"it has more than 8 bits a channel (dtype {dtype}): --levels 65536 keeps them")
    return array.astype(np.float32)


def _in_unit_range(array: np.ndarray, value_range: Sequence[float] | None) -> np.ndarray:
    """Returns floats of a range in [0, 1]."""
    if value_range is None:
        raise ValueError(
            f"its values are floats (dtype {array.dtype}): --value_range LOW HIGH names those of black and white"
        )
    low, high = value_range
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("not all of its values are finite")
    if values.size and not low <= values.min() <= values.max() <= high:
        raise ValueError(
            f"its values reach from {values.min():g} to {values.max():g}, beyond --value_range {low:g} {high:g}"
        )
    return (values - low) / (high - low)


def _in_color(gray: Image.Image, image_format: ImageFormat) -> list[Image.Image]:
    """Returns a gray plane as 3 planes, or as 4 with an opaque one."""
    channels = image_format.channels
    if channels not in (3, 4):
        raise ValueError(
            f"it is gray: channels={channels} needs arrays of {channels} channels, or a TIFF of {channels} pages"
        )
    return [gray, gray, gray, *[Image.new(gray.mode, gray.size, image_format.white)] * (channels - 3)]


def _check_size(width: int, height: int, image_format: ImageFormat) -> None:
    """Raises a `ValueError` if an image is smaller than asked for, unless such images are enlarged."""
    _, rows, columns = image_format.shape
    if not image_format.enlarge and (width < columns or height < rows):
        asked = f"{rows}" if rows == columns else f"{rows}x{columns} (height x width)"
        raise ValueError(f"{width}x{height} is smaller than resolution={asked}")


def _resize(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    size = image_format.width, image_format.height
    if image.size == size:
        return image
    if image_format.crop == "center":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = max(size[0] / image.width, size[1] / image.height)
    covering = [max(asked, round(side * scale)) for asked, side in zip(size, image.size, strict=True)]
    return image.resize((covering[0], covering[1]), Image.Resampling.LANCZOS)
