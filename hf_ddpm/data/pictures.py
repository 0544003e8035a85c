"""Load image files upright, even if their metadata is damaged."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError

from hf_ddpm.data.scan import as_path, register_plugins

# PIL modes with one gray channel.
GRAY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")

ORIENTATION = ExifTags.Base.Orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PNG, TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
# Chunks of a PNG that its pixels depend on; eXIf and small iTXt chunks may contain the orientation.
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
LARGEST_XMP = 65536
# Tags of a TIFF that its pixels depend on: sizes, depths, offsets, compression, colors, orientation.
TIFF_TAGS = {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 301, 317, 320, 322, 323,
             324, 325, 330, 332, 334, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532}  # fmt: skip


def open_image(row: dict[str, Any]) -> Image.Image:
    """Load an image upright, without other conversions. Ignores damaged metadata.

    Raises:
        Exception: If the pixels cannot be read (PIL raises many types), or are too many (`DecompressionBombError`).
    """
    register_plugins()
    data, path = row["bytes"], row["path"]
    try:
        image = _load(as_path(path) if data is None else io.BytesIO(data))
    except (Image.DecompressionBombError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # decoders raise many types
        plain = _without_metadata(Path(as_path(path)).read_bytes() if data is None else data)
        try:
            image = _load(io.BytesIO(plain))
        except Image.DecompressionBombError:
            raise
        except Exception:
            if isinstance(error, UnidentifiedImageError):  # its text contains a memory address
                raise ValueError("not an image of a known format") from error
            raise error from None
    method = UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def image_array(image: Image.Image, channels: int, deep: bool, background: str = "white") -> np.ndarray | None:
    """Read an image as an array if PIL's conversions would lose information.

    Args:
        image: The loaded image.
        channels: Number of channels of the result.
        deep: If true, return 16-bit pixels.
        background: Color behind transparent pixels, converted to gray.

    Returns:
        For a TIFF of gray pages, shape `(H, W, channels)` with the pages as channels; for images of floats, or of 16
        bits with `deep`, shape `(H, W, 1)`; None for other images.

    Raises:
        ValueError: If the number of pages is not `channels`.
    """
    pages = _pages(image)
    if pages is not None:
        if len(pages) != channels:
            raise ValueError(
                f"image has {len(pages)} gray pages but --channels is {channels}; expected --channels {len(pages)}"
            )
        return np.stack(pages, axis=-1)
    if image.mode == "F" or (deep and image.mode.startswith("I")):
        values = _unsigned(np.asarray(image))
        if isinstance(hidden := image.info.get("transparency"), int):
            gray = ImageColor.getcolor(background, "L")
            values = np.where(values == hidden, np.uint16(gray * 257), values)
        return values[..., np.newaxis]
    return None


def _load(source: Any) -> Image.Image:
    """Load an image; set `info["depth_lost"]` if PIL has reduced 16 bits per channel to 8."""
    image = Image.open(source)
    tiles = list(getattr(image, "tile", []))
    image.load()
    is_8_bit = image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")
    image.info["depth_lost"] = is_8_bit and any(re.search(r";16|, 65535\)", str(tile[3])) for tile in tiles)
    return image


def _orientation(image: Image.Image) -> int:
    """Return the orientation of an image from its EXIF or XMP data: 1 to 8, by default 1, upright."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raises many types
        value = None
    if value is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        text = xmp if isinstance(xmp, bytes) else str(xmp).encode()
        match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', text)
        value = int(match[1]) if match else None
    return value if isinstance(value, int) else 1


def _pages(image: Image.Image) -> list[np.ndarray] | None:
    """Return the gray pages of a TIFF; None if there is only one page, or if pages differ in size or mode."""
    count = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or count == 1 or image.mode not in GRAY_MODES:
        return None
    kind, pages = (image.mode, image.size), []
    for number in range(count):
        image.seek(number)
        if (image.mode, image.size) != kind:
            image.seek(0)
            return None
        pages.append(_unsigned(np.asarray(image)))
    return pages


def _unsigned(values: np.ndarray) -> np.ndarray:
    """Return pixels of 32-bit integers (mode I) as uint16, others unchanged."""
    if values.dtype.kind != "i":
        return values
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixel values from {values.min()} to {values.max()} do not fit in 16 bits")
    return values.astype(np.uint16)


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG or TIFF file without metadata; other files unchanged."""
    if data.startswith(PNG):
        return _plain_png(data)
    return _plain_tiff(data) if data.startswith(TIFF) else data


def _plain_png(data: bytes) -> bytes:
    """Return a PNG file with only the chunks of pixels and of intact orientation data."""
    kept, start = [PNG], len(PNG)
    while start + 12 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        chunk = data[start : start + 12 + size]
        kind, start = chunk[4:8], start + len(chunk)
        is_intact = zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        # An uncompressed text: the keyword, a zero byte, and a compression flag of zero.
        is_xmp = kind == b"iTXt" and size < LARGEST_XMP and chunk[8:].startswith(b"XML:com.adobe.xmp\0\0")
        if kind in PNG_CHUNKS or (is_intact and (kind == b"eXIf" or is_xmp)):
            kept.append(chunk)
    return b"".join(kept)


def _plain_tiff(data: bytes) -> bytes:
    """Return a TIFF file whose first directory has only the tags that pixels depend on."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}L", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from(f"{order}H", data, start)
    end = start + 2 + 12 * count
    entries = [data[at : at + 12] for at in range(start + 2, end, 12)]
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack(f"{order}H", entry[:2])[0] in TIFF_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + data[end : end + 4]
    return data[:start] + directory.ljust(end + 4 - start, b"\0") + data[end + 4 :]
