"""Read and write generated images: atomically written shards, folders of PNG files, and array files."""

import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.data.arrays import open_stack
from hf_ddpm.data.transforms import as_bytes
from hf_ddpm.images import MODES, from_pil, sample_grid, save_picture, to_pil
from hf_ddpm.sampling.options import SHARD_SIZE
from hf_ddpm.utils.files import atomic_write, one_line, write_text

GRID_IMAGES = 64


class SampleFolder:
    """Folder of generated images 0, 1, 2, ... and the settings that determine them, in `sampling.json`.

    `shards/000000.npy` contains the images 0 to 255 as uint8, shape `(n, C, H, W)`; the next file the next 256 images,
    and so on. Shards are written atomically. Images are only appended to a shard, never changed.

    Args:
        path: The folder.
        settings: The settings that determine the images, in types that JSON supports; `shape` is the shape of an image,
            `(C, H, W)`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.settings = {"shard_size": SHARD_SIZE, **settings}
        self.shape = tuple(settings["shape"])
        self._open: dict[int, np.ndarray] = {}

    @classmethod
    def read(cls, path: Path) -> "SampleFolder":
        """Open a folder for reading; raise a `ValueError` if its settings are missing or its shard size differs."""
        settings = _read_settings(path)
        if settings is None or settings["shard_size"] != SHARD_SIZE:
            raise ValueError(
                f"{path}: not a folder of samples; expected sampling.json and shards of {SHARD_SIZE} images"
            )
        return cls(path, settings)

    @property
    def stored_precision(self) -> str | None:
        """The `mixed_precision` of the existing images; None if the folder has no images."""
        stored = _read_settings(self.path) if any(self.path.glob("shards/*.npy")) else None
        return None if stored is None else stored.get("mixed_precision", "no")

    def check(self, ignored: Sequence[str] = ()) -> None:
        """Raise a `ValueError` that lists the differences if the folder contains images sampled with other settings.

        Args:
            ignored: Settings that may differ.
        """
        stored = _read_settings(self.path)
        if not any(self.path.glob("shards/*.npy")):
            if any(re.fullmatch(r"\d{5,}\.png", path.name) for path in self.path.glob("*.png")):
                raise ValueError(
                    f"{self.path}: folder contains images sampled with unknown settings; choose another folder"
                )
            return
        if stored is None:
            raise ValueError(f"{self.path}: sampling.json is missing or damaged; choose another folder")
        now = json.loads(json.dumps(self.settings))
        changed = [
            f"{key}={now.get(key)!r} (was {stored.get(key)!r})"
            for key in sorted(now.keys() | stored.keys())
            if key not in ignored and now.get(key) != stored.get(key)
        ]
        if changed:
            reason = f"folder contains images sampled with other settings: {', '.join(changed)}"
            raise ValueError(f"{self.path}: {reason}; choose another folder")

    def bind(self) -> None:
        """Write `sampling.json`, unless the folder already contains a shard."""
        (self.path / "shards").mkdir(parents=True, exist_ok=True)
        if not any(self.path.glob("shards/*.npy")):
            write_text(self.path / "sampling.json", json.dumps(self.settings, indent=2) + "\n")

    def missing(self, num_images: int) -> list[range]:
        """Return the indices of missing images, as one range per incomplete shard."""
        parts = []
        for start in range(0, num_images, SHARD_SIZE):
            end = min(start + SHARD_SIZE, num_images)
            first = start + len(self._read(start // SHARD_SIZE))
            if first < end:
                parts.append(range(first, end))
        return parts

    def add(self, indices: range, images: Tensor) -> None:
        """Append images to a shard and flush it to disk.

        Args:
            indices: Indices of the images, a range returned by `missing`.
            images: The images, uint8, shape `(len(indices), C, H, W)`.
        """
        shard = indices.start // SHARD_SIZE
        before = self._read(shard)
        if shard * SHARD_SIZE + len(before) != indices.start:
            expected = indices.start - shard * SHARD_SIZE
            reason = f"file contains {len(before)} images; expected {expected}"
            raise OSError(f"{self._file(shard)}: {reason}; another process may have changed it")
        with atomic_write(self._file(shard)) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([before, images.numpy()]))
            file.flush()
            os.fsync(file.fileno())
        self._open.pop(shard, None)

    def __len__(self) -> int:
        """Return the number of images before the first missing one."""
        shard = 0
        while len(self._read(shard)) == SHARD_SIZE:
            shard += 1
        return shard * SHARD_SIZE + len(self._read(shard))

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return images by index, int64, shape `(B,)`, as uint8, shape `(B, C, H, W)`, on the CPU."""
        return torch.from_numpy(np.stack([self._image(index) for index in indices.tolist()]))

    def write_images(self, indices: Sequence[int]) -> None:
        """Write images as `00000.png`, ..., unless a file already contains the image."""
        existing = set(os.listdir(self.path))
        for index in indices:
            file, image = self.path / f"{index:05d}.png", self._image(index)
            if file.name not in existing or not _shows(file, image):
                save_picture(to_pil(torch.from_numpy(image[np.newaxis].copy()))[0], file)

    def write_grid(self, num_images: int) -> None:
        """Write `grid.png` with the first 64 images."""
        first = self[torch.arange(min(num_images, GRID_IMAGES))]
        save_picture(sample_grid(first, self.settings.get("class_labels", ())), self.path / "grid.png")

    def write_npz(self, num_images: int) -> None:
        """Write `samples.npz`: `arr_0`, uint8, shape `(N, H, W, C)`, as common evaluation code expects it."""
        channels, height, width = self.shape
        # Image by image, as all images together may not fit into memory.
        with (
            atomic_write(self.path / "samples.npz") as partial,
            zipfile.ZipFile(partial, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            shape = (num_images, height, width, channels)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for index in range(num_images):
                file.write(self._image(index).transpose(1, 2, 0).tobytes())

    def _file(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:06d}.npy"

    def _image(self, index: int) -> np.ndarray:
        shard, row = divmod(index, SHARD_SIZE)
        if row >= len(self._open.get(shard, ())):
            self._open[shard] = self._read(shard)
        if row >= len(self._open[shard]):
            raise IndexError(f"{self.path}: image {index} is missing")
        return self._open[shard][row]

    def _read(self, shard: int) -> np.ndarray:
        """Return a memory-mapped shard; an empty array if it is missing, damaged or of another image shape."""
        nothing = np.empty((0, *self.shape), np.uint8)
        try:
            images = np.load(self._file(shard), mmap_mode="r")  # raises a ValueError for a truncated file
        except (OSError, ValueError, EOFError):
            return nothing
        is_valid = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == self.shape
        return images if is_valid and len(images) <= SHARD_SIZE else nothing


class ImageFolder:
    """Folder of PNG files, sorted by name, all of one size and mode; `grid.png` is ignored.

    Args:
        path: The folder.
        background: Background color of transparent pixels, except in RGBA files.

    Raises:
        ValueError: If the folder contains no PNG file.
    """

    def __init__(self, path: Path, background: str = "white"):
        self.path, self.background = path, background
        self.files = sorted(file for file in path.glob("*.png") if file.name != "grid.png")
        if not self.files:
            raise ValueError(
                f"--samples {path}: folder contains no samples; expected shards, PNG files or one .npz file"
            )
        self.shape = self._load(self.files[0]).shape

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return images as uint8, shape `(B, C, H, W)`; raise a `ValueError` if a shape differs from the first."""
        images = []
        for index in indices.tolist():
            images.append(self._load(self.files[index]))
            if images[-1].shape != self.shape:
                shapes = f"image has shape {images[-1].shape}; expected {self.shape}, the shape of the first image"
                raise ValueError(f"{self.files[index]}: {shapes}")
        return torch.from_numpy(np.stack(images))

    def _load(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                channels = {mode: channels for channels, mode in MODES.items()}.get(image.mode, 3)
                return from_pil(as_bytes(image, channels, self.background), channels)
        except OSError as error:
            raise ValueError(f"{file}: not an image: {one_line(error)}") from error
        except ValueError as error:
            raise ValueError(f"{file}: image is unusable: {error}") from error


class SampleFile:
    """Images of a `.npz` or `.npy` file, memory-mapped unless the file is compressed.

    Args:
        path: The file; its first array of 4 dimensions is used: uint8, shape `(N, H, W, C)`.

    Raises:
        ValueError: If the file cannot be read, or contains no such array or no image.
    """

    def __init__(self, path: Path):
        self.path, self._images = path, open_stack(path)
        if self._images.dtype != np.uint8 or not self._images.size:
            kind = f"{self._images.dtype} of shape {self._images.shape}"
            raise ValueError(
                f"--samples {path}: {kind}; expected uint8 of shape (N, H, W, C), as written by hf-ddpm sample"
            )
        _, height, width, channels = self._images.shape
        self.shape = channels, height, width

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return images by index, int64, shape `(B,)`, as uint8, shape `(B, C, H, W)`."""
        # A copy, so that the strides are as in other batches and features are identical to the last bit.
        return torch.from_numpy(self._images[indices.numpy()].transpose(0, 3, 1, 2).copy())


Samples = SampleFolder | ImageFolder | SampleFile


def open_samples(path: Path, background: str = "white") -> Samples:
    """Open generated images.

    Args:
        path: A folder written by `hf-ddpm sample`, a folder of PNG files, a folder with `samples.npz` or one other
            `.npz` file, or a `.npz` or `.npy` file.
        background: Background color of transparent pixels, except in RGBA files.

    Returns:
        The images.

    Raises:
        ValueError: If the path has another format, or contains no images.
    """
    if path.is_file():
        return SampleFile(path)
    has_shards = any(path.glob("shards/*.npy"))
    files = [path / "samples.npz"] if (path / "samples.npz").exists() else list(path.glob("*.npz"))
    has_images = any(file.name != "grid.png" for file in path.glob("*.png"))
    if len(files) == 1 and not has_shards and not has_images:
        return SampleFile(files[0])
    return SampleFolder.read(path) if (path / "sampling.json").exists() else ImageFolder(path, background)


def _shows(file: Path, image: np.ndarray) -> bool:
    """Return whether a file is readable and contains this image, shape `(C, H, W)`."""
    try:
        with Image.open(file) as stored:
            return stored.mode == MODES[len(image)] and np.array_equal(from_pil(stored, len(image)), image)
    except Exception:  # decoders raise anything
        return False


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads((path / "sampling.json").read_text())
        return settings if {"shape", "shard_size"} <= settings.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
