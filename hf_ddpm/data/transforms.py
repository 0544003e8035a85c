"""One encoded image to an array of the size, channels and depth that a network is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from hf_ddpm.data.arrays import channels_last, picture_array, read_array, to_color, to_planes
from hf_ddpm.data.pictures import open_picture
from hf_ddpm.images import MODES, from_pil
from hf_ddpm.utils.options import require_range, require_value

# More than 8 bits a channel: PIL would clip these to 255 when it converts.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageFormat:
    """What images are made into.

    Attributes:
        height: Rows of pixels.
        width: Columns of pixels.
        channels: 1, 3 or 4; any other number for arrays of exactly so many channels.
        crop: What is cut from an image of another shape, once its smaller side fits: the `center`, or, anew each time
            the image is seen, a place at `random`.
        deep: Whether pixels have 16 bits; with several channels from arrays only: PIL reads color with 8.
        enlarge: Whether images that are smaller are scaled up; they are refused otherwise.
        value_range: The floats that become black and white, for arrays and pictures of floats.

    Raises:
        ValueError: If a value is not allowed.
    """

    height: int
    width: int
    channels: int
    crop: Literal["center", "random"] = "center"
    deep: bool = False
    enlarge: bool = False
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        require_value("resolution", (self.height, self.width), min(self.shape[1:]) >= 1, "at least 1")
        require_value("channels", self.channels, self.channels >= 1, "at least 1")
        require_value("crop", self.crop, self.crop in ("center", "random"), "center or random")
        require_range(self, "value_range")

    @classmethod
    def of(
        cls,
        resolution: int | tuple[int, int],
        channels: int,
        *,
        levels: int = 256,
        crop: str = "center",
        enlarge: bool = False,
        value_range: Sequence[float] | None = None,
    ) -> "ImageFormat":
        """Returns the format for a resolution, one number or height and width, and a number of values of a pixel."""
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        require_value("levels", levels, 2 <= levels <= 65536, "2 to 65536")
        limits = None if value_range is None else tuple(map(float, value_range))
        return cls(height, width, channels, crop, levels > 256, enlarge, limits)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape `(C, H, W)` of an image."""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> type[np.generic]:
        """What pixels are kept as: uint8, or uint16 where images are deep."""
        return np.uint16 if self.deep else np.uint8


def fit(row: dict[str, Any] | None, form: ImageFormat, notes: list[str] | None = None) -> np.ndarray:
    """Decodes an image and fits it: turned as its camera says, transparency laid on white unless there are 4 channels.

    Args:
        row: The image as `datasets` keeps it: `bytes`, or the `path` of a file.
        form: What it is made into.
        notes: Gets a line on what is lost, such as bits of color.

    Returns:
        Pixels, `form.dtype`, shape `(C, H, W)`; with random crops one of H and W may be larger, for `crop_at`.

    Raises:
        Exception: If it is missing, unreadable (whatever PIL raises), smaller than asked for or deeper.
    """
    if row is None or (row["bytes"] is None and row["path"] is None):
        raise ValueError("there is none")
    array = read_array(row)
    if array is None:
        image = open_picture(row)
        _check_size(image.width, image.height, form)
        if image.info["depth_lost"]:
            if form.deep:
                raise ValueError("it has color or transparency with 16 bits, which PIL reads as 8: use an array")
            if notes is not None:
                notes.append("16 bits per channel are read as 8")
        array = picture_array(image, form.channels, form.deep)
        if array is None and notes is not None and getattr(image, "n_frames", 1) > 1:
            notes.append("only the first frame or page is read")
    else:
        array = channels_last(array, form.channels)
    if array is None:
        if not form.deep:
            return from_pil(_resize(as_bytes(image, form.channels), form), form.channels)
        if form.channels > 1:
            raise ValueError(
                f"color with 16 bits needs arrays, or a TIFF of {form.channels} pages: PIL reads it with 8"
            )
        array = np.asarray(as_bytes(image, 1))[..., np.newaxis]
    _check_size(array.shape[1], array.shape[0], form)
    planes = to_planes(array, form.deep, form.value_range)
    if len(planes) < form.channels:
        planes = to_color(planes[0], form.channels, np.iinfo(form.dtype).max)
    pixels = np.stack([np.asarray(_resize(plane, form)) for plane in planes])
    return pixels if pixels.dtype == np.uint8 else pixels.round().clip(0, np.iinfo(form.dtype).max).astype(form.dtype)


def crop_at(pixels: np.ndarray, form: ImageFormat, where: Sequence[float]) -> np.ndarray:
    """Cuts an image of the asked size out of a larger one.

    Args:
        pixels: Shape `(C, H, W)`, at least as large as `form`.
        form: The size.
        where: How far down and right the cut is, of what is spare, in [0, 1): all places are equally likely if they are
            uniform.

    Returns:
        A view of the pixels, of shape `form.shape`.
    """
    top = int(where[0] * (pixels.shape[1] - form.height + 1))
    left = int(where[1] * (pixels.shape[2] - form.width + 1))
    return pixels[:, top : top + form.height, left : left + form.width]


def as_bytes(image: Image.Image, channels: int) -> Image.Image:
    """Returns an image of 1, 3 or 4 channels of 8 bits, transparency laid on white unless there are 4.

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
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _check_size(width: int, height: int, form: ImageFormat) -> None:
    """Raises a `ValueError` if an image is smaller than asked for, unless such images are enlarged."""
    if not form.enlarge and (width < form.width or height < form.height):
        asked = f"{form.height}" if form.height == form.width else f"{form.height}x{form.width} (height x width)"
        raise ValueError(f"{width}x{height} is smaller than resolution={asked}")


def _resize(image: Image.Image, form: ImageFormat) -> Image.Image:
    size = form.width, form.height
    if image.size == size:
        return image
    if form.crop == "center":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = max(form.width / image.width, form.height / image.height)
    covering = [max(asked, round(side * scale)) for asked, side in zip(size, image.size, strict=True)]
    return image.resize((covering[0], covering[1]), Image.Resampling.LANCZOS)
