"""Images as arrays: `.npy` and `.npz` files, and TIFF files with a page per channel."""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from hf_ddpm.data.scan import as_path
from hf_ddpm.utils.files import one_line

SUFFIXES = (".npy", ".npz")
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"

# Modes of PIL with one channel whose numbers are brightness.
GRAY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def read_array(row: dict[str, Any]) -> np.ndarray | None:
    """Reads an image that is stored as an array.

    Args:
        row: The image as `datasets` keeps it: `bytes`, or the `path` of a file.

    Returns:
        The array, as it is; None if the row is not an array, by its first bytes or the suffix of its path.

    Raises:
        ValueError: If it cannot be read, or is not one image.
    """
    if row["bytes"] is None:
        path = Path(as_path(row["path"]))
        if path.suffix.lower() not in SUFFIXES:
            return None
        content: bytes = path.read_bytes()
    else:
        content = row["bytes"]
        if not content.startswith((NPY, ZIP)):
            return None
    if content.startswith(NPY):
        return np.load(io.BytesIO(content), allow_pickle=False)
    if not content.startswith(ZIP):
        raise ValueError("it is not a .npy or .npz file")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return archive[_image_of(_headers(io.BytesIO(content)))]


def open_stack(path: Path) -> np.ndarray:
    """Opens a file of many images, mapped to memory unless it is compressed.

    Args:
        path: A `.npy` file of 4 dimensions, or a `.npz` file: its first array of 4 dimensions is taken.

    Returns:
        The array, such as `(N, H, W, C)`.

    Raises:
        ValueError: If it cannot be read, or has no array of 4 dimensions.
    """
    try:
        name = _stack_of(_headers(path))
        if name is None:
            raise ValueError("no array of 4 dimensions, (N, H, W, C)")
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                while file.read(2**20):
                    pass  # at its end the checksum is compared
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, info)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except OSError:
        raise
    except Exception as error:  # whatever zip archives and numpy raise
        raise ValueError(f"{path} cannot be read as an array of images: {one_line(error)}") from error


def is_stack(path: Path) -> bool:
    """Returns whether a file holds many images; what cannot be read is one image, which will be refused by name."""
    try:
        return any(len(shape) == 4 for shape, *_ in _headers(path).values())
    except Exception:  # whatever zip archives and numpy raise
        return False


def channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """Returns one image as `(H, W, C)`.

    Args:
        array: Shape `(H, W, C)`, or `(C, H, W)` if the last axis is not C, or `(H, W)` for one channel.
        channels: The number C of channels.

    Returns:
        A view of the array.

    Raises:
        ValueError: If it has another number of channels, or other dimensions.
    """
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


def to_planes(array: np.ndarray, deep: bool, value_range: tuple[float, float] | None) -> list[Image.Image]:
    """Returns the channels of an image as pictures that PIL can resize.

    Args:
        array: Shape `(H, W, C)`; uint8, uint16, bool, or floats with a `value_range`.
        deep: Whether white is 65535, not 255.
        value_range: The floats that become black and white.

    Returns:
        A picture per channel: of bytes (mode L) where these suffice, else of floats (mode F) in [0, white].

    Raises:
        ValueError: If the dtype is another one or has more bits, or a float is not finite or beyond the range.
    """
    white = 65535 if deep else 255
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "b":
        array, kind, bits = array.astype(np.uint8) * np.uint8(255), "u", 8
    if kind == "f":
        values = _scaled(array, value_range) * white
    elif kind == "u" and bits == 8:
        values = array.astype(np.float32) * 257 if deep else array
    elif kind == "u" and bits == 16:
        if not deep:
            raise ValueError(f"it has more than 8 bits a channel (dtype {array.dtype}): --levels 65536 keeps them")
        values = array
    else:
        raise ValueError(f"dtype {array.dtype} is not supported: expected uint8, uint16, bool, or floats")
    values = values if values.dtype == np.uint8 else values.astype(np.float32)
    return [Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(values.shape[2])]


def picture_array(image: Image.Image, channels: int, deep: bool) -> np.ndarray | None:
    """Reads a picture as an array where PIL's conversions would lose something.

    Args:
        image: An opened picture.
        channels: The number of channels asked for.
        deep: Whether 16 bits are asked for.

    Returns:
        Shape `(H, W, channels)`, the pages of a TIFF as channels, or `(H, W, 1)`, floats, or with `deep` 16 bits; None
        for other pictures.

    Raises:
        ValueError: If there are more or fewer pages than channels.
    """
    pages = _pages(image)
    if pages is not None:
        count = pages.shape[2]
        if count != channels:
            raise ValueError(
                f"it has {count} gray pages, not channels={channels}: --channels {count} reads all of them"
            )
        return pages
    if image.mode == "F" or (deep and image.mode.startswith("I")):
        values = _unsigned(np.asarray(image))
        if isinstance(hidden := image.info.get("transparency"), int):
            values = np.where(values == hidden, 65535, values)  # transparency on white
        return values[..., np.newaxis]
    return None


def to_color(gray: Image.Image, channels: int, white: float) -> list[Image.Image]:
    """Returns a gray plane as `channels` planes: 3, or 4 with an opaque one; a `ValueError` for other numbers."""
    if channels not in (3, 4):
        raise ValueError(
            f"it is gray: channels={channels} needs arrays of {channels} channels, or a TIFF of {channels} pages"
        )
    return [gray, gray, gray, *[Image.new(gray.mode, gray.size, white)] * (channels - 3)]


def _headers(file: Path | BinaryIO) -> dict[str, Header]:
    """Returns shape, order and dtype of each array in a file, by name, without reading the arrays."""
    if isinstance(file, Path) and file.suffix.lower() == ".npy":
        with file.open("rb") as content:
            return {"": _header(content)}
    headers = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as content:
                    headers[name.removesuffix(".npy")] = _header(content)
    return headers


def _header(file: Any) -> Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _image_of(headers: dict[str, Header]) -> str:
    """Returns the name of the only array of 2 or 3 dimensions."""
    names = [name for name, (shape, *_) in headers.items() if len(shape) in (2, 3)]
    if len(names) != 1:
        found = ", ".join(f"{name} {shape}" for name, (shape, *_) in headers.items()) or "none"
        raise ValueError(f"it holds the arrays {found}: expected one of 2 or 3 dimensions, or one of 4")
    return names[0]


def _stack_of(headers: dict[str, Header]) -> str | None:
    """Returns the name of the array of 4 dimensions, or `arr_0` of several; None if there is none."""
    names = [name for name, (shape, *_) in headers.items() if len(shape) == 4]
    if len(names) > 1 and "arr_0" not in names:
        raise ValueError(f"it holds several arrays of 4 dimensions, {', '.join(names)}: expected one, or arr_0")
    return "arr_0" if "arr_0" in names else next(iter(names), None)


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Maps an array that is stored in a zip archive without compression."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # lengths of name and extra field, which follow a header of 30 bytes
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        shape, is_fortran, dtype = _header(file)
        offset = file.tell()
    if dtype.hasobject or offset - start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} is not {shape} of {dtype}")
    return np.memmap(path, dtype, "r", offset, shape, "F" if is_fortran else "C")


def _scaled(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
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


def _pages(image: Image.Image) -> np.ndarray | None:
    """Returns the gray pages of a TIFF, `(H, W, pages)`; None if there is one page, or they differ in size or kind."""
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
    return np.stack(pages, axis=-1)


def _unsigned(values: np.ndarray) -> np.ndarray:
    """Returns pixels of 32-bit integers (mode I) as uint16, others as they are."""
    if values.dtype.kind != "i":
        return values
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits")
    return values.astype(np.uint16)
