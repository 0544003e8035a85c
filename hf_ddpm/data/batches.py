"""Training batches as a pure function of (seed, step), for decoded images and for streams.

A source has no position to save: a run resumes from its step alone. Processes that share a global batch get the same
images together as one process would get.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hf_ddpm.data.store import ImageStore
from hf_ddpm.utils.seeds import CROP, ORDER, generator


@dataclass(frozen=True)
class Batch:
    """Images of a global batch, or a part of them.

    Attributes:
        images: Pixels, uint8 (uint16 for 16-bit images), shape `(B, C, H, W)`.
        labels: Their classes, int64, shape `(B,)`; None without a class column.
    """

    images: Tensor
    labels: Tensor | None


class BatchSource(Protocol):
    """A source of images for training.

    Attributes:
        shape: Shape `(C, H, W)` of an image.
        class_names: Names of the classes; empty without a class column.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def skipped(self) -> int:
        """The number of unusable images so far."""

    def __len__(self) -> int:
        """Return the number of images per epoch."""

    def batch(self, step: int, rows: slice) -> Batch:
        """Return images of the global batch of a step.

        Args:
            step: Optimizer step, from 0.
            rows: Rows of the global batch, such as the rows of this process: a slice with start and stop.

        Returns:
            The images, on the device; the same for every call and every number of processes.
        """

    def close(self) -> None:
        """End threads and processes."""


class ShuffledImages:
    """The images of a store, shuffled: each epoch is a permutation of all images.

    Args:
        store: The images.
        seed: Seed of the run.
        batch_size: Images per global batch.
        ahead: If true, a thread prefetches the next batch; by default if the images do not fit into a GPU's memory.
    """

    def __init__(self, store: ImageStore, *, seed: int, batch_size: int, ahead: bool | None = None):
        self.store, self.seed, self.batch_size = store, seed, batch_size
        self.ahead = store.device.type == "cuda" and not store.is_resident if ahead is None else ahead
        self._reader = ThreadPoolExecutor(1) if self.ahead else None
        self._next: tuple[tuple[int, slice] | None, Future[Batch] | None] = None, None
        self.shape, self.class_names, self.skipped = store.shape, store.class_names, store.skipped

    def __len__(self) -> int:
        """Return the number of images per epoch."""
        return len(self.store)

    def batch(self, step: int, rows: slice) -> Batch:
        """Return images of the global batch of a step; see `BatchSource`."""
        if self._reader is None:
            return self._batch(step, rows)
        request, future = self._next
        batch = future.result() if future is not None and request == (step, rows) else self._batch(step, rows)
        self._next = (step + 1, rows), self._reader.submit(self._batch, step + 1, rows)
        return batch

    def _batch(self, step: int, rows: slice) -> Batch:
        store = self.store
        indices = batch_indices(self.seed, step, self.batch_size, len(self), store.index_device)[rows]
        labels = None if store.labels is None else store.labels[indices].to(store.device, non_blocking=True)
        if store.image_format.crop == "center":
            return Batch(store[indices], labels)
        return Batch(store.cropped(indices, crop_positions(self.seed, step, self.batch_size)[rows]), labels)

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)


def batch_indices(seed: int, step: int, batch: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the indices of a global batch; epochs are permutations of all images and follow each other without a gap.

    Args:
        seed: Seed of the run.
        step: Optimizer step, from 0.
        batch: Images per global batch.
        size: Images in the dataset.
        device: Device of the indices; the order of an epoch is copied to it once.

    Returns:
        Indices, int64, shape `(batch,)`.
    """
    parts, start, end = [], step * batch, (step + 1) * batch
    while start < end:
        epoch, first = divmod(start, size)
        parts.append(_epoch_order(seed, epoch, size, torch.device(device))[first : first + end - start])
        start += len(parts[-1])
    return torch.cat(parts)


def crop_positions(seed: int, step: int, batch: int) -> Tensor:
    """Draw the crop positions of a global batch, uniform in [0, 1), shape `(batch, 2)`; see `crop_at`."""
    return torch.rand(batch, 2, generator=generator(seed, CROP, step))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=generator(seed, ORDER, epoch)).to(device)
