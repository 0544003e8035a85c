"""Streams of training images: parquet files read, shuffled and decoded on demand."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_ddpm.config import DataConfig
from hf_ddpm.data.batches import Batch, crop_positions
from hf_ddpm.data.columns import find_class_column, find_classes, find_image_column
from hf_ddpm.data.decoding import BadImage, attempt, read_report
from hf_ddpm.data.sources import find_shards
from hf_ddpm.data.streaming.lanes import Lanes
from hf_ddpm.data.streaming.shards import Shards
from hf_ddpm.data.streaming.windows import Pick, WindowReader
from hf_ddpm.data.transforms import ImageFormat, crop_at
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.jsonl import append_line
from hf_ddpm.utils.launch import own_cores

# Parameters of `Lanes`. Up to 16 processes read little that they do not use, and hold about 2 * 16 * 1024 encoded
# images together. Another value changes the images of every streamed run.
LANES, WINDOW_ROWS = 16, 1024
# Default limit of the number of decoding processes.
MOST_WORKERS = 8

Position = Sequence[float]


class ImageStream:
    """Images of parquet files, in the order of `Lanes`.

    Threads prefetch encoded rows. Worker processes decode them; each decodes the requested rows of one batch at a time.
    Prefetching is bounded, so memory use stays constant. Consecutive steps with the same rows are fast; any other
    request restarts prefetching and returns the same images.

    An unusable image raises a `ValueError`. With `skip_bad_images`, the next usable image of its window replaces it and
    so appears twice in that epoch.

    Args:
        reader: Reads the windows of the lanes.
        image_format: Format of the decoded images.
        device: Device of the batches.
        skip_bad_images: If true, skip unusable images.
        report: JSON Lines file to which unusable images are added; each process adds the ones it finds.
        workers: Number of decoding processes; 0 to decode in this process on request. By default one per core, up to 8.

    Attributes:
        shape: Shape `(C, H, W)` of an image.
        class_names: Names of the classes; empty without a class column.
        skipped: The number of unusable images so far: in the report, and found by this process.
    """

    def __init__(
        self,
        reader: WindowReader,
        image_format: ImageFormat,
        *,
        device: torch.device | str = "cpu",
        skip_bad_images: bool = False,
        report: Path | None = None,
        workers: int | None = None,
    ):
        self.reader, self.image_format, self.device = reader, image_format, torch.device(device)
        self.shape = image_format.shape
        self.class_names = reader.classes.names if reader.classes else ()
        self.skip_bad_images, self.report = skip_bad_images, report
        self._known_bad = {(file, row) for file, row in (read_report(report) if report else ()) if row is not None}
        self._next: tuple[int, slice] | None = None
        self._jobs = _Jobs(reader, image_format)
        workers = min(own_cores(), MOST_WORKERS) if workers is None else workers
        self._loader: Any = DataLoader(
            _Decoder(image_format),
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_serve_parent if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # keeps the global generator unchanged
        )
        self._decoded: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Return the number of images per epoch, including unusable ones."""
        return len(self.reader.lanes)

    @property
    def skipped(self) -> int:
        """The number of unusable images so far."""
        return len(self._known_bad)

    def batch(self, step: int, rows: slice) -> Batch:
        """Return images of the global batch of a step; see `BatchSource`.

        Raises:
            ValueError: If an image or a file is unusable; the message names it and the reason.
            OSError: If a decoding process has died.
        """
        rows = slice(*rows.indices(self.reader.lanes.batch_size)[:2])
        if self._decoded is None or self._next != (step, rows):
            self._jobs.start(step, rows)
            self._decoded = iter(self._loader)
        self._next = None  # set again below if there is no error
        try:
            images, bad = next(self._decoded)
        except RuntimeError as error:
            raise OSError(f"a process that decodes images has died: {one_line(error)}") from error
        picks, positions = self._jobs.pending.popleft()
        if isinstance(picks, ValueError):
            raise picks
        for row, reason in bad:
            picks[row], images[row] = self._replacement(picks[row], reason, positions[row])
        self._next = step + 1, rows
        labels = None
        if self.reader.classes is not None:
            labels = self._moved(torch.tensor([pick.window.labels[pick.row] for pick in picks], dtype=torch.int64))
        return Batch(self._moved(torch.from_numpy(images)), labels)

    def close(self) -> None:
        """End the processes and threads."""
        self._decoded = self._next = self._loader = None  # the processes end with the loader
        self._jobs.pending.clear()
        self.reader.close()

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _replacement(self, pick: Pick, reason: str, position: Position) -> tuple[Pick, np.ndarray]:
        """Return the next usable image of the window of a bad image; raise an error unless bad images are skipped."""
        window = pick.window
        self._report(BadImage(*window.origins[pick.row], reason))
        for further in range(1, len(window.images)):
            row = (pick.row + further) % len(window.images)
            image = attempt(window.images[row], self.image_format)
            if not isinstance(image, str):
                return Pick(window, row), crop_at(image, self.image_format, position)
            self._report(BadImage(*window.origins[row], image))
        path, row = window.origins[pick.row]
        raise ValueError(
            f"all images read together are unusable ({len(window.images)}); row {row} of {path!r}: {reason}"
        )

    def _report(self, bad: BadImage) -> None:
        if not self.skip_bad_images:
            raise bad.error(self.reader.column)
        key = (bad.file, bad.row)
        if key not in self._known_bad:
            self._known_bad.add(key)
            if self.report is not None:
                append_line(self.report, asdict(bad))


def open_stream(
    data: DataConfig,
    *,
    seed: int,
    batch_size: int,
    report: Path | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> ImageStream:
    """Open a dataset of parquet files as a stream; only the footers of the files are read.

    Args:
        data: Options of the images; see `find_shards` for datasets. With `max_train_samples`, random row groups are
            used, and of the last one only the first rows. A `class_column` without class names is read completely.
        seed: Seed of the run.
        batch_size: Images per global batch, over all processes.
        report: JSON Lines file to which bad images and other unused files are added.
        device: Device of the batches.
        workers: Number of decoding processes; by default one per core, up to 8.
        log: Called with a line about unused files of a folder.

    Returns:
        The source of images; the caller closes it.

    Raises:
        ValueError: If the dataset or a column is unusable; the message names it and the reason.
    """
    paths, unused_files = find_shards(data, log)
    shards = Shards(paths)
    column, classes = find_image_column(shards.features, data.image_column), None
    if data.class_column is not None:
        class_column = find_class_column(shards.features, data.class_column)
        classes = find_classes(shards.features, class_column, shards.values(class_column))
    groups = shards.some(data.max_train_samples, seed)
    plan = Lanes(seed, batch_size, [group.rows for group in groups], lanes=LANES, window_rows=WINDOW_ROWS)
    if report is not None:
        listed = read_report(report)
        for file in unused_files:
            if (file.file, None) not in listed:
                append_line(report, asdict(BadImage(file.file, None, file.reason)))
    return ImageStream(
        WindowReader(groups, plan, column, classes),
        ImageFormat.of(data),
        device=device,
        skip_bad_images=data.skip_bad_images,
        report=report,
        workers=workers,
    )


class _Jobs:
    """Decoding jobs: the rows of consecutive steps and their crop positions."""

    def __init__(self, reader: WindowReader, image_format: ImageFormat):
        self.reader, self.image_format = reader, image_format
        self.pending: deque[tuple[list[Pick] | ValueError, list[Position]]] = deque()
        self.start(0, slice(0, 0))

    def start(self, step: int, rows: slice) -> None:
        """Set the first step and the rows of the next iteration."""
        self.step, self.rows = step, rows
        self.pending.clear()

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any] | None], list[Position]]]:
        """Yield encoded images and crop positions; wait until they are read."""
        step = self.step
        while True:
            try:
                picks = self.reader.picks(step, self.rows)
            except ValueError as error:
                # `batch` raises the error at its step, not while prefetching.
                self.pending.append((error, []))
                yield [], []
            else:
                positions = self._positions(step, len(picks))
                self.pending.append((picks, positions))
                yield [pick.window.images[pick.row] for pick in picks], positions
            step += 1

    def _positions(self, step: int, count: int) -> list[Position]:
        if self.image_format.crop == "center":
            return [(0.0, 0.0)] * count
        lanes = self.reader.lanes
        return crop_positions(lanes.seed, step, lanes.batch_size)[self.rows].tolist()


class _Decoder(Dataset[Any]):
    """Decode a job of `_Jobs`, given as an index, to its images and the rows and reasons of bad images."""

    def __init__(self, image_format: ImageFormat):
        self.image_format = image_format

    def __getitem__(self, job: tuple[list[dict[str, Any] | None], list[Position]]) -> tuple[np.ndarray, list[Any]]:
        images = np.zeros((len(job[0]), *self.image_format.shape), self.image_format.dtype)
        bad = []
        for row, (encoded, position) in enumerate(zip(*job, strict=True)):
            image = attempt(encoded, self.image_format)
            if isinstance(image, str):
                bad.append((row, image))
            else:
                images[row] = crop_at(image, self.image_format, position)
        return images, bad


def _as_it_is(decoded: Any) -> Any:
    return (
        decoded  # numpy arrays are sent through a pipe; tensors would need shared memory, which is small in containers
    )


def _serve_parent(worker: int) -> None:
    """Ignore signals (the parent handles them) and exit when the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole process group, but the parent needs its last batch
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
