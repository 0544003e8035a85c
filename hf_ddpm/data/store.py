"""Decoded images by index, as fast as the memory that holds them."""

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ddpm.data.decoding import decode
from hf_ddpm.data.sources import find_image_column, open_dataset

# Sets up to this size are held in the memory of the device, larger ones stay mapped to the file.
RESIDENT_BYTES = 2 * 1024**3


class ImageStore:
    """Images of one size: an index tensor in, NCHW uint8 out.

    Args:
        decoded: What `decode` returned.
        shape: Shape `(C, H, W)` of an image.
        device: Where batches are wanted.
    """

    def __init__(self, decoded: Dataset, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        self.shape = shape
        self.device = torch.device(device)
        self._table = decoded.with_format("arrow")
        resident = len(decoded) * int(np.prod(shape)) <= RESIDENT_BYTES
        self._images = self._read(slice(None)).to(self.device) if resident else None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._table)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Returns the images at `indices`, int64, shape `(B,)`, as uint8, shape `(B, C, H, W)`, on the device."""
        if self._images is not None:
            return self._images[indices.to(self.device)]
        return self._read(indices.tolist()).to(self.device, non_blocking=True)

    def _read(self, rows: slice | list[int]) -> Tensor:
        raw = bytearray().join(self._table[rows]["pixels"].to_pylist())  # writable, as torch wants its memory
        return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, *self.shape))


def load_images(
    name: str,
    *,
    split: str = "train",
    column: str | None = None,
    resolution: int,
    channels: int,
    device: torch.device | str = "cpu",
) -> ImageStore:
    """Opens a data set, decodes its images (once: the result is cached) and stores them for batches.

    Args:
        name: `digits`, a folder, a parquet file or an id on the Hub.
        split: Name of the split.
        column: Column of the images; guessed if None.
        resolution: Height and width that images are fitted to, in pixels.
        channels: 1, 3 or 4.
        device: Where batches are wanted.

    Returns:
        The images.

    Raises:
        ValueError: If the data set, the column or an image is not usable; each is named, with the reason.
    """
    dataset = open_dataset(name, split)
    decoded = decode(dataset, find_image_column(dataset, column), resolution=resolution, channels=channels)
    return ImageStore(decoded, (channels, resolution, resolution), device)
