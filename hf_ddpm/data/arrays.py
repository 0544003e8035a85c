"""Read images from `.npy` and `.npz` files."""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_ddpm.data.scan import as_path
from hf_ddpm.utils.files import one_line

SUFFIXES = (".npy", ".npz")
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def read_array(row: dict[str, Any]) -> np.ndarray | None:
    """Return the array of an image; None if the image is not an array file, by its first bytes or its suffix.

    Raises:
        ValueError: If the file cannot be read, or does not contain exactly one image.
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
        raise ValueError("not a .npy or .npz file")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return archive[_image_of(_headers(io.BytesIO(content)))]


def open_stack(path: Path) -> np.ndarray:
    """Open a file of many images, memory-mapped unless it is compressed.

    Args:
        path: A `.npy` file with 4 dimensions; or a `.npz` file with one array of 4 dimensions, or several, of which
            `arr_0` is used.

    Returns:
        The array, such as `(N, H, W, C)`.

    Raises:
        ValueError: If the file cannot be read, or has no array of 4 dimensions.
    """
    try:
        name = _stack_of(_headers(path))
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                while file.read(2**20):
                    pass  # reading to the end verifies the checksum
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, info)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy raise many types
        raise ValueError(f"{path}: cannot be read as an array of images: {one_line(error)}") from error


def is_stack(path: Path) -> bool:
    """Return whether a file contains many images; an unreadable file counts as one image and is reported later."""
    try:
        return any(len(shape) == 4 for shape, *_ in _headers(path).values())
    except Exception:  # zipfile and numpy raise many types
        return False


def _headers(file: Path | BinaryIO) -> dict[str, Header]:
    """Return the shape, memory order and dtype of each array in a file, by name, without reading the arrays."""
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
    """Return the name of the only array of 2 or 3 dimensions."""
    names = [name for name, (shape, *_) in headers.items() if len(shape) in (2, 3)]
    if len(names) != 1:
        listed = ", ".join(f"{name} {shape}" for name, (shape, *_) in headers.items()) or "none"
        raise ValueError(f"the file contains the arrays {listed}; expected one with 2 or 3 dimensions, or one with 4")
    return names[0]


def _stack_of(headers: dict[str, Header]) -> str:
    """Return the name of the array with 4 dimensions; `arr_0` if there are several."""
    names = [name for name, (shape, *_) in headers.items() if len(shape) == 4]
    if not names:
        raise ValueError("no array has 4 dimensions; expected (N, H, W, C)")
    if len(names) > 1 and "arr_0" not in names:
        raise ValueError(f"several arrays have 4 dimensions ({', '.join(names)}); expected one, or the name arr_0")
    return "arr_0" if "arr_0" in names else names[0]


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Memory-map an array that is stored in a zip archive without compression."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the lengths of name and extra field, which follow the 30-byte header
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        shape, is_fortran, dtype = _header(file)
        offset = file.tell()
    if dtype.hasobject or offset - start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename}: size does not match shape {shape} and dtype {dtype}")
    return np.memmap(path, dtype, "r", offset, shape, "F" if is_fortran else "C")
