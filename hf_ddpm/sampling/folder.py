"""Generated images on disk, by number: shards that a kill cannot spoil, and folders of pictures from anywhere."""

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
    """The first images of an infinite row, and in `sampling.json` what determines that row.

    `shards/000000.npy` holds the images 0 to 255 as uint8, shape `(n, C, H, W)`, the next file the next ones. A shard
    appears whole or not at all; one with fewer images may be continued, and none is ever changed otherwise.

    Args:
        path: The folder.
        settings: What determines the images, all that JSON can hold; `shape` is that of an image, `(C, H, W)`.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.settings = {"shard_size": SHARD_SIZE, **settings}
        self.shape = tuple(settings["shape"])
        self._open: dict[int, np.ndarray] = {}

    @classmethod
    def read(cls, path: Path) -> "SampleFolder":
        """Opens a folder for reading; a `ValueError` if its settings are not there or of other shards."""
        settings = _read_settings(path)
        if settings is None or settings["shard_size"] != SHARD_SIZE:
            raise ValueError(f"{path} holds no samples: shards of {SHARD_SIZE} images and sampling.json are wanted")
        return cls(path, settings)

    @property
    def stored_precision(self) -> str | None:
        """The `mixed_precision` of the images that are there; None if there are none."""
        there = _read_settings(self.path) if any(self.path.glob("shards/*.npy")) else None
        return None if there is None else there.get("mixed_precision", "no")

    def check(self, free: Sequence[str] = ()) -> None:
        """Raises a `ValueError` if the folder holds images of other settings, `free` ones aside, each named."""
        there = _read_settings(self.path)
        if not any(self.path.glob("shards/*.npy")):
            if any(re.fullmatch(r"\d{5,}\.png", path.name) for path in self.path.glob("*.png")):
                raise ValueError(f"{self.path} holds images of unknown settings: choose another folder")
            return
        if there is None:
            raise ValueError(f"{self.path} holds shards but no sampling.json that can be read: choose another folder")
        now = json.loads(json.dumps(self.settings))
        changed = [
            f"{key}={now.get(key)!r} (was {there.get(key)!r})"
            for key in sorted(now.keys() | there.keys())
            if key not in free and now.get(key) != there.get(key)
        ]
        if changed:
            raise ValueError(f"{self.path} holds images of other settings, choose another folder: {', '.join(changed)}")

    def bind(self) -> None:
        """Writes `sampling.json`: from its first shard on the folder takes no images of other settings."""
        (self.path / "shards").mkdir(parents=True, exist_ok=True)
        if not any(self.path.glob("shards/*.npy")):
            write_text(self.path / "sampling.json", json.dumps(self.settings, indent=2) + "\n")

    def missing(self, num_images: int) -> list[range]:
        """Returns the numbers of images that are not there yet, a range for each shard that lacks some."""
        parts = []
        for start in range(0, num_images, SHARD_SIZE):
            end = min(start + SHARD_SIZE, num_images)
            first = start + len(self._read(start // SHARD_SIZE))
            if first < end:
                parts.append(range(first, end))
        return parts

    def add(self, numbers: range, images: Tensor) -> None:
        """Adds images to a shard, on disk before this returns.

        Args:
            numbers: Those that `missing` named.
            images: Uint8, shape `(len(numbers), C, H, W)`.
        """
        shard = numbers.start // SHARD_SIZE
        before = self._read(shard)
        if shard * SHARD_SIZE + len(before) != numbers.start:
            raise OSError(f"{self._file(shard)} holds {len(before)} images: has another run changed it?")
        with atomic_write(self._file(shard)) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([before, images.numpy()]))
            file.flush()
            os.fsync(file.fileno())
        self._open.pop(shard, None)

    def __len__(self) -> int:
        """Returns how many images there are without a gap, from the first."""
        shard = 0
        while len(self._read(shard)) == SHARD_SIZE:
            shard += 1
        return shard * SHARD_SIZE + len(self._read(shard))

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Returns the images of these numbers, int64, shape `(B,)`, as bytes, shape `(B, C, H, W)`, on the CPU."""
        return torch.from_numpy(np.stack([self._image(number) for number in numbers.tolist()]))

    def write_pictures(self, numbers: Sequence[int]) -> None:
        """Writes the images of these numbers as `00000.png`, ..., those that are missing or damaged."""
        there = set(os.listdir(self.path))
        for number in numbers:
            file, image = self.path / f"{number:05d}.png", self._image(number)
            if file.name not in there or not _shows(file, image):
                save_picture(to_pil(torch.from_numpy(image[np.newaxis].copy()))[0], file)

    def write_grid(self, num_images: int) -> None:
        """Writes `grid.png`, the first 64 of the images."""
        first = self[torch.arange(min(num_images, GRID_IMAGES))]
        save_picture(sample_grid(first, self.settings.get("class_labels", ())), self.path / "grid.png")

    def write_npz(self, num_images: int) -> None:
        """Writes `samples.npz`: `arr_0`, uint8, shape `(N, H, W, C)`, as the evaluation code of others reads it."""
        channels, height, width = self.shape
        # Image by image: all of them together may be larger than the memory.
        with (
            atomic_write(self.path / "samples.npz") as partial,
            zipfile.ZipFile(partial, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            shape = (num_images, height, width, channels)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for number in range(num_images):
                file.write(self._image(number).transpose(1, 2, 0).tobytes())

    def _file(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:06d}.npy"

    def _image(self, number: int) -> np.ndarray:
        shard, row = divmod(number, SHARD_SIZE)
        if row >= len(self._open.get(shard, ())):
            self._open[shard] = self._read(shard)
        if row >= len(self._open[shard]):
            raise IndexError(f"image {number} is not in {self.path}")
        return self._open[shard][row]

    def _read(self, shard: int) -> np.ndarray:
        """Returns a shard, mapped to its file; no images if it is missing or no whole shard of this folder."""
        nothing = np.empty((0, *self.shape), np.uint8)
        try:
            images = np.load(self._file(shard), mmap_mode="r")  # which refuses a file that is too short
        except (OSError, ValueError, EOFError):
            return nothing
        is_sound = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == self.shape
        return images if is_sound and len(images) <= SHARD_SIZE else nothing


class PictureFolder:
    """The pictures of a folder in the order of their names, as they are: all of one size and mode.

    Args:
        path: The folder.
        background: Color behind transparent pixels of pictures without four channels.

    Raises:
        ValueError: If there is no PNG in it.
    """

    def __init__(self, path: Path, background: str = "white"):
        self.path, self.background = path, background
        self.files = sorted(file for file in path.glob("*.png") if file.name != "grid.png")
        if not self.files:
            raise ValueError(
                f"samples={str(path)!r} is not allowed: it holds neither shards, PNG files nor one .npz file"
            )
        self.shape = self._load(self.files[0]).shape

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self.files)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Returns pictures as bytes, shape `(B, C, H, W)`; a `ValueError` if one differs from the first in shape."""
        images = []
        for number in numbers.tolist():
            images.append(self._load(self.files[number]))
            if images[-1].shape != self.shape:
                raise ValueError(f"{self.files[number]} is of {images[-1].shape}, the others are of {self.shape}")
        return torch.from_numpy(np.stack(images))

    def _load(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                channels = {mode: channels for channels, mode in MODES.items()}.get(image.mode, 3)
                return from_pil(as_bytes(image, channels, self.background), channels)
        except OSError as error:
            raise ValueError(f"{file} is no picture: {one_line(error)}") from error
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from error


class SampleFile:
    """The images of a `.npz` or `.npy` file, mapped to memory unless it is compressed.

    Args:
        path: The file: its first array of 4 dimensions is taken, uint8, shape `(N, H, W, C)`.

    Raises:
        ValueError: If it cannot be read, or has no such array, or no image.
    """

    def __init__(self, path: Path):
        self.path, self._images = path, open_stack(path)
        if self._images.dtype != np.uint8 or not self._images.size:
            kind = f"{self._images.dtype} of shape {self._images.shape}"
            raise ValueError(f"samples={str(path)!r}: {kind}; expected uint8, shape (N, H, W, C), as sample.py writes")
        _, height, width, channels = self._images.shape
        self.shape = channels, height, width

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Returns images by their numbers, int64, shape `(B,)`, as bytes, shape `(B, C, H, W)`."""
        # A copy has the strides of any other batch, also of one channel: features then agree to the last bit.
        return torch.from_numpy(self._images[numbers.numpy()].transpose(0, 3, 1, 2).copy())


Samples = SampleFolder | PictureFolder | SampleFile


def open_samples(path: Path, background: str = "white") -> Samples:
    """Opens generated images.

    Args:
        path: A folder that `hf-ddpm sample` wrote, of PNG files, or of `samples.npz` or one other `.npz` file; or a
            `.npz` or `.npy` file.
        background: Color behind transparent pixels of PNG files without four channels.

    Returns:
        The images.

    Raises:
        ValueError: If it is none of these.
    """
    if path.is_file():
        return SampleFile(path)
    has_shards = any(path.glob("shards/*.npy"))
    files = [path / "samples.npz"] if (path / "samples.npz").exists() else list(path.glob("*.npz"))
    has_pictures = any(file.name != "grid.png" for file in path.glob("*.png"))
    if len(files) == 1 and not has_shards and not has_pictures:
        return SampleFile(files[0])
    return SampleFolder.read(path) if (path / "sampling.json").exists() else PictureFolder(path, background)


def _shows(file: Path, image: np.ndarray) -> bool:
    """Returns whether a file is a readable picture of an image, shape `(C, H, W)`."""
    try:
        with Image.open(file) as picture:
            return picture.mode == MODES[len(image)] and np.array_equal(from_pil(picture, len(image)), image)
    except Exception:  # decoders raise anything
        return False


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads((path / "sampling.json").read_text())
        return settings if {"shape", "shard_size"} <= settings.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
