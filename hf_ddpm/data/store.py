"""Random access to decoded images, in memory or memory-mapped."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ddpm.config import DataConfig
from hf_ddpm.data.columns import find_image_column, read_classes
from hf_ddpm.data.decoding import BadImage, decode, write_report
from hf_ddpm.data.sources import choose, open_split
from hf_ddpm.data.transforms import ImageFormat, crop_at

# Datasets up to this size, or up to this share of the free memory of a GPU, are loaded into the memory of the device;
# larger ones stay memory-mapped.
RESIDENT_BYTES, RESIDENT_SHARE = 2 * 1024**3, 0.25


class ImageStore:
    """Images of one size by index tensor, as NCHW uint8, or uint16 if `image_format` is deep.

    Args:
        decoded: The decoded images, from `decode`.
        image_format: Their format.
        device: Device of the batches.
        labels: The classes of the images, int64, shape `(N,)`.
        class_names: Names of the classes.
        skipped: Number of skipped images.

    Attributes:
        is_resident: True if all images are in the memory of the device.
        index_device: Device of the indices and labels, chosen so that no step waits for a copy.
    """

    def __init__(
        self,
        decoded: Dataset,
        image_format: ImageFormat,
        device: torch.device | str = "cpu",
        *,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        skipped: int = 0,
    ):
        self.image_format, self.shape, self.class_names = image_format, image_format.shape, class_names
        self.skipped, self.device = skipped, torch.device(device)
        self._table = decoded.with_format("arrow")
        size = len(decoded) * int(np.prod(self.shape)) * np.dtype(image_format.dtype).itemsize
        # Images for random crops have different sizes, so they stay in the table.
        self.is_resident = image_format.crop == "center" and size <= _resident_bytes(self.device)
        self._images = self._read(slice(None)) if self.is_resident else None
        self.index_device = self.device if self.is_resident else torch.device("cpu")
        self.labels = None if labels is None else labels.to(self.index_device)
        if self._images is not None:
            # Stored as int16, because some operations on some devices do not support uint16.
            self._images = (self._images.view(torch.int16) if image_format.deep else self._images).to(self.device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._table)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`, int64, shape `(B,)`, as pixels, shape `(B, C, H, W)`, on the device.

        With random crops, images are cropped at the center here.
        """
        if self._images is not None:
            images = self._images.index_select(0, indices.to(self.device))  # several times faster than indexing
            return images.view(torch.uint16) if self.image_format.deep else images
        if self.image_format.crop == "random":
            return self.cropped(indices, torch.full((len(indices), 2), 0.5))
        return self._moved(self._read(indices.tolist()))

    def cropped(self, indices: Tensor, positions: Tensor) -> Tensor:
        """Return images that were decoded for random crops.

        Args:
            indices: Indices of the images, int64, shape `(B,)`.
            positions: Crop positions (down, right) as fractions of the largest offset, in [0, 1), shape `(B, 2)`.

        Returns:
            Pixels, shape `(B, C, H, W)`, on the device.
        """
        rows, dtype = self._table[indices.tolist()], self.image_format.dtype
        sizes = zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)
        images = np.empty((len(indices), *self.shape), dtype)
        for image, raw, size, position in zip(images, rows["pixels"], sizes, positions.tolist(), strict=True):
            pixels = np.frombuffer(raw.as_buffer(), dtype).reshape(self.shape[0], *size)
            image[:] = crop_at(pixels, self.image_format, position)
        return self._moved(torch.from_numpy(images))

    def _moved(self, pixels: Tensor) -> Tensor:
        """Return pixels on the device; copies to a GPU are asynchronous."""
        pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        return pixels.to(self.device, non_blocking=True)

    def _read(self, rows: slice | list[int]) -> Tensor:
        raw = bytearray().join(self._table[rows]["pixels"].to_pylist())  # torch needs writable memory
        return torch.from_numpy(np.frombuffer(raw, self.image_format.dtype).reshape(-1, *self.shape))


def _resident_bytes(device: torch.device) -> float:
    """Return the largest size of a dataset that is loaded into the memory of a device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return max(RESIDENT_BYTES, RESIDENT_SHARE * free)


def load_images(
    data: DataConfig,
    *,
    seed: int = 0,
    report: Path | None = None,
    device: torch.device | str = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> ImageStore:
    """Open a dataset, decode its images (once, into a cache) and store them for batches.

    Args:
        data: Options of the images.
        seed: Seed of the random choice of `max_train_samples` images.
        report: JSON Lines file for bad images and other unused files, which may be empty.
        device: Device of the batches.
        log: Called with lines about unused files and damaged caches.

    Returns:
        The images.

    Raises:
        ValueError: If the dataset, a column or an image is unusable; the message names it and the reason.
        OSError: If the disk of the cache is full.
    """
    image_format = ImageFormat.of(data)
    dataset, unused_files = open_split(data, log)
    column = find_image_column(dataset.features, data.image_column)
    rows = choose(len(dataset), data.max_train_samples, seed)
    dataset = dataset.select(rows) if len(rows) < len(dataset) else dataset
    classes, labels = None, None
    if data.class_column is not None:
        classes, labels = read_classes(dataset, data.class_column, rows)
    decoded, usable, bad = decode(dataset, column, image_format, rows, skip_bad_images=data.skip_bad_images, log=log)
    if report is not None:
        write_report([*bad, *(BadImage(file.file, None, file.reason) for file in unused_files)], report)
    return ImageStore(
        decoded,
        image_format,
        device,
        labels=None if labels is None else labels[torch.as_tensor(usable)],
        class_names=classes.names if classes else (),
        skipped=len(bad),
    )
