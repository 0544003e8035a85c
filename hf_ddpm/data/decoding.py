"""Files to bytes, once: every image is decoded, fitted and kept as the raw bytes of a CHW array in a cached table."""

import io
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from hf_ddpm.images import MODES, from_pil

# Part of the cache's key, which does not see the functions below: raised when they change what they return.
RECIPE = 1

# More than 8 bits a channel: PIL would clip these to 255 when it converts.
DEEP_MODES = ("I", "F")


def decode(dataset: Dataset, column: str, *, resolution: int, channels: int) -> Dataset:
    """Decodes all images of a split into raw bytes; a second call with the same arguments reads the cache.

    Images are turned as their camera says, transparent ones laid on white unless there are 4 channels, then resized and
    cropped at the centre.

    Args:
        dataset: An opened split.
        column: Its column of images.
        resolution: Height and width that images are fitted to, in pixels.
        channels: 1, 3 or 4.

    Returns:
        A data set with the single column `pixels`: CHW uint8 of every image, in order, as bytes.

    Raises:
        ValueError: If an image cannot be read or fitted; row, file and reason are named.
    """
    encoded = dataset.cast_column(column, Image(decode=False))
    return encoded.map(
        _decode_rows,
        with_indices=True,
        batched=True,
        batch_size=256,
        fn_kwargs={"column": column, "resolution": resolution, "channels": channels, "recipe": RECIPE},
        remove_columns=encoded.column_names,
        features=Features({"pixels": Value("binary")}),
        desc="Decoding images",
    )


def _decode_rows(
    rows: dict[str, list[Any]], indices: list[int], column: str, resolution: int, channels: int, recipe: int
) -> dict[str, list[bytes]]:
    pixels = []
    for index, row in zip(indices, rows[column], strict=True):
        try:
            pixels.append(_decode_one(row, resolution, channels).tobytes())
        except Exception as error:
            where = (row or {}).get("path") or f"column {column!r}"
            raise ValueError(f"image in row {index} ({where}) is not usable: {error}") from error
    return {"pixels": pixels}


def _decode_one(row: dict[str, Any] | None, resolution: int, channels: int) -> np.ndarray:
    if row is None:
        raise ValueError("there is none")
    image = PILImage.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(DEEP_MODES):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}), which {MODES[channels]} would clip")
    if channels < 4 and image.has_transparency_data:
        # Behind transparent pixels files hold arbitrary colours.
        page = PILImage.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    if min(image.size) < resolution:
        raise ValueError(f"{image.width}x{image.height} is smaller than resolution={resolution}")
    if image.size != (resolution, resolution):
        # Palettes are resolved first: their indices must not be interpolated.
        image = ImageOps.fit(image.convert(MODES[channels]), (resolution, resolution), PILImage.Resampling.LANCZOS)
    return from_pil(image, channels)
