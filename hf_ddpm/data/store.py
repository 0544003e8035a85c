"""Decoded images by index, as fast as the memory that holds them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ddpm.data.decoding import BadImage, UnusableImage, decode, write_report
from hf_ddpm.data.labels import read_classes
from hf_ddpm.data.sources import choose, find_image_column, open_split
from hf_ddpm.data.transforms import ImageFormat, crop_at

# Sets up to this size are held in the memory of the device, larger ones stay mapped to the file.
RESIDENT_BYTES = 2 * 1024**3


class ImageStore:
    """Images of one size: an index tensor in, NCHW uint8 (or uint16, where `form` is deep) out.

    Args:
        decoded: What `decode` returned.
        form: What it was told to make of images.
        device: Where batches are wanted.
        labels: The classes of the images, int64, shape `(N,)`.
        class_names: Their names.
        skipped: Images that were left out.
    """

    def __init__(
        self,
        decoded: Dataset,
        form: ImageFormat,
        device: torch.device | str = "cpu",
        *,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        skipped: int = 0,
    ):
        self.form, self.shape, self.class_names, self.skipped = form, form.shape, class_names, skipped
        self.device = torch.device(device)
        self.labels = None if labels is None else labels.to(self.device)
        self._table = decoded.with_format("arrow")
        size = len(decoded) * int(np.prod(self.shape)) * np.dtype(form.dtype).itemsize
        # Images that are cut anew each time are of many sizes: they stay in their table.
        resident = form.crop == "center" and size <= RESIDENT_BYTES
        self._images = self._read(slice(None)) if resident else None
        if self._images is not None:
            # Not every operation on every device knows unsigned integers of 16 bits; as signed ones they are at home.
            self._images = (self._images.view(torch.int16) if form.deep else self._images).to(self.device)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._table)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Returns the images at `indices`, int64, shape `(B,)`, as pixels, shape `(B, C, H, W)`, on the device.

        Images to be cropped at random are cropped at the center.
        """
        if self._images is not None:
            images = self._images.index_select(0, indices.to(self.device))  # several times faster than indexing
            return images.view(torch.uint16) if self.form.deep else images
        if self.form.crop == "random":
            return self.cropped(indices, torch.full((len(indices), 2), 0.5))
        return self._read(indices.tolist()).to(self.device, non_blocking=True)

    def cropped(self, indices: Tensor, where: Tensor) -> Tensor:
        """Returns images that were decoded for random crops.

        Args:
            indices: Which, int64, shape `(B,)`.
            where: How far down and right each is cut, of what is spare, in [0, 1), shape `(B, 2)`.

        Returns:
            Pixels, shape `(B, C, H, W)`, on the device.
        """
        rows = self._table[indices.tolist()]
        sizes = zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)
        images = np.empty((len(indices), *self.shape), self.form.dtype)
        for image, raw, size, place in zip(images, rows["pixels"], sizes, where.tolist(), strict=True):
            pixels = np.frombuffer(raw.as_buffer(), self.form.dtype).reshape(self.shape[0], *size)
            image[:] = crop_at(pixels, self.form, place)
        return torch.from_numpy(images).to(self.device, non_blocking=True)

    def _read(self, rows: slice | list[int]) -> Tensor:
        raw = bytearray().join(self._table[rows]["pixels"].to_pylist())  # writable, as torch wants its memory
        return torch.from_numpy(np.frombuffer(raw, self.form.dtype).reshape(-1, *self.shape))


def load_images(
    name: str,
    *,
    split: str = "train",
    column: str | None = None,
    resolution: int | tuple[int, int],
    channels: int,
    levels: int = 256,
    crop: str = "center",
    enlarge: bool = False,
    value_range: Sequence[float] | None = None,
    config: str | None = None,
    class_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    skip_bad_images: bool = False,
    report: Path | None = None,
    device: torch.device | str = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> ImageStore:
    """Opens a data set, decodes its images (once: the result is cached) and stores them for batches.

    Args:
        name: `digits`, a folder, a file or an id on the Hub; see `open_split`.
        split: Name of the split.
        column: Column of the images; guessed if None.
        resolution: Height and width that images are fitted to, in pixels, or one number for both.
        channels: 1, 3 or 4, or the number that arrays have.
        levels: Evenly spaced values of a pixel; above 256 images have 16 bits.
        crop: `center`, or `random`, for `ImageStore.cropped`.
        enlarge: Whether images that are smaller than the resolution are scaled up, not refused.
        value_range: The floats that become black and white, for images of floats.
        config: Configuration, for data sets with several ones.
        class_column: Column of the classes, or `auto` to guess it; without it there are no labels.
        max_samples: How many images to use, drawn at random (folders come class by class); by default all.
        seed: Seed of that draw.
        skip_bad_images: Whether images that cannot be used are left out.
        report: File for those left out, and for files that are no images, as lines of JSON; empty if none are.
        device: Where batches are wanted.
        log: Called with a line on the files that are not used, and on damaged caches.

    Returns:
        The images.

    Raises:
        ValueError: If the data set, a column or an image is not usable; each is named, with the reason.
        OSError: If the disk of the cache is full.
    """
    form = ImageFormat.of(resolution, channels, levels=levels, crop=crop, enlarge=enlarge, value_range=value_range)
    dataset, left_out = open_split(name, split, config=config, class_column=class_column, log=log)
    column = find_image_column(dataset, column)
    rows = choose(len(dataset), max_samples, seed)
    dataset = dataset.select(rows) if len(rows) < len(dataset) else dataset
    classes, labels = None, None
    if class_column is not None:
        classes, labels = read_classes(dataset, class_column, rows)
    try:
        decoded, bad = decode(dataset, column, form, skip_bad_images=skip_bad_images, log=log)
    except UnusableImage as error:  # its row is that of the draw
        raise replace(error.image, row=rows[error.image.row]).refusal(column) from error
    if labels is not None:
        kept = torch.ones(len(dataset), dtype=torch.bool)
        kept[[image.row for image in bad]] = False
        labels = labels[kept]
    if report is not None:
        unused = [BadImage(file.file, None, file.reason) for file in left_out]
        write_report([replace(image, row=rows[image.row]) for image in bad] + unused, report)
    names = () if classes is None else classes.names
    return ImageStore(decoded, form, device, labels=labels, class_names=names, skipped=len(bad))
