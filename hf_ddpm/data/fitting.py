"""One encoded image to an array of the size, channels and depth that a network is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from hf_ddpm.data.pictures import open_picture
from hf_ddpm.images import MODES, from_pil
from hf_ddpm.options import require_value

# More than 8 bits a channel: PIL would clip these to 255 when it converts. Floats have no known white.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageFormat:
    """What images are made into.

    Attributes:
        height: Rows of pixels.
        width: Columns of pixels.
        channels: 1, 3 or 4.
        crop: What is cut from an image of another shape, once its smaller side fits: the `center`, or, anew each time
            the image is seen, a place at `random`.
        deep: Whether pixels have 16 bits, for one channel only: PIL reads color of 16 bits a channel as 8.
        enlarge: Whether images that are smaller are scaled up; they are refused otherwise.

    Raises:
        ValueError: If a value is not allowed.
    """

    height: int
    width: int
    channels: int
    crop: Literal["center", "random"] = "center"
    deep: bool = False
    enlarge: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        require_value("resolution", (self.height, self.width), min(self.shape[1:]) >= 1, "at least 1")
        require_value("channels", self.channels, self.channels in MODES, ", ".join(map(str, MODES)))
        require_value("crop", self.crop, self.crop in ("center", "random"), "center or random")
        require_value("channels", self.channels, self.channels == 1 or not self.deep, "1 with more than 256 levels")

    @classmethod
    def of(
        cls,
        resolution: int | tuple[int, int],
        channels: int,
        *,
        levels: int = 256,
        crop: str = "center",
        enlarge: bool = False,
    ) -> "ImageFormat":
        """Returns the format for a resolution, one number or height and width, and a number of values of a pixel."""
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        require_value("levels", levels, 2 <= levels <= 65536, "2 to 65536")
        return cls(height, width, channels, crop, deep=levels > 256, enlarge=enlarge)  # type: ignore[arg-type]

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
    image = open_picture(row)
    _check_size(image.width, image.height, form)
    if image.info["depth_lost"]:
        if form.deep:
            raise ValueError("it has color or transparency with 16 bits, which PIL reads as 8: save it as 16-bit gray")
        if notes is not None:
            notes.append("16 bits per channel are read as 8")
    image = _as_floats(image, form.channels) if form.deep else as_bytes(image, form.channels)
    if image.size != (form.width, form.height):
        image = _resize(image, form)
    if form.deep:
        return np.asarray(image).round().clip(0, 65535).astype(np.uint16)[np.newaxis]
    return from_pil(image, form.channels)


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
        ValueError: If it has more bits.
    """
    # Always before resizing: the indices of a palette must not be interpolated.
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


def _as_floats(image: Image.Image, channels: int) -> Image.Image:
    if not image.mode.startswith(DEEP_MODES):
        return Image.fromarray(np.asarray(as_bytes(image, channels)).astype(np.float32) * 257)  # 255 becomes 65535
    if image.mode == "F":
        raise ValueError("its pixels are floats (mode F), of which no white is known: save it as 16-bit integers")
    values = np.asarray(image)
    if isinstance(hidden := image.info.get("transparency"), int):
        values = np.where(values == hidden, 65535, values)  # transparency on white
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits")
    return Image.fromarray(values.astype(np.float32))


def _resize(image: Image.Image, form: ImageFormat) -> Image.Image:
    size = form.width, form.height
    if form.crop == "center":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = max(form.width / image.width, form.height / image.height)
    covering = [max(asked, round(side * scale)) for asked, side in zip(size, image.size, strict=True)]
    return image.resize((covering[0], covering[1]), Image.Resampling.LANCZOS)
