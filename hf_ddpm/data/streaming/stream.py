"""Images of a set larger than memory and disk: read, decoded and shuffled as they are needed."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.batches import Batch, crop_places
from hf_ddpm.data.decoding import BadImage, attempt, read_report
from hf_ddpm.data.labels import find_class_column, find_classes
from hf_ddpm.data.sources import find_image_column, find_shards
from hf_ddpm.data.streaming.decoders import Place, decoding
from hf_ddpm.data.streaming.lanes import Lanes
from hf_ddpm.data.streaming.shards import Shards
from hf_ddpm.data.streaming.windows import LoadedWindow, WindowReader
from hf_ddpm.data.transforms import ImageFormat, crop_at
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.jsonl import append_line
from hf_ddpm.utils.launch import own_cores

# More decoding processes are not started unless asked for.
MOST_WORKERS = 8


class Pick(NamedTuple):
    """A row of a batch: its window and its place there."""

    window: LoadedWindow
    row: int


class ImageStream:
    """Images of parquet files, in the order of training; `Lanes` says what an epoch is.

    Threads read encoded rows ahead of their use. Processes decode: each a batch at a time, and of it only the rows
    asked for. What is ahead is bounded, so memory stays flat. Asking for the steps in order, and for the same rows, is
    fast; any other call is answered alike, after a moment.

    An image that cannot be used raises a `ValueError`; with `skip_bad_images` the next usable one of its window stands
    in for it, and is seen twice in that epoch.

    Args:
        reader: Reads the windows of the lanes.
        form: What images are made into.
        device: Where batches are wanted.
        skip_bad_images: Whether to go on over images that cannot be used.
        report: File to which these are added, as lines of JSON; each process adds those that it meets.
        workers: Processes that decode; 0 to decode in this one, when asked. By default one a core, up to 8.

    Attributes:
        shape: Shape `(C, H, W)` of an image.
        class_names: Names of the classes; empty if none were asked for.
        skipped: Images that could not be used, so far: those of the report, and those that this process has met.
    """

    def __init__(
        self,
        reader: WindowReader,
        form: ImageFormat,
        *,
        device: torch.device | str = "cpu",
        skip_bad_images: bool = False,
        report: Path | None = None,
        workers: int | None = None,
    ):
        self.reader, self.form, self.device = reader, form, torch.device(device)
        self.shape = form.shape
        self.class_names = reader.classes.names if reader.classes else ()
        self.skip_bad_images, self.report = skip_bad_images, report
        self._known_bad = {(file, row) for file, row in (read_report(report) if report else ()) if row is not None}
        self._next: tuple[int, slice] | None = None
        self._jobs = _Jobs(reader, form)
        count = min(own_cores(), MOST_WORKERS) if workers is None else workers
        self._loader = decoding(form, self._jobs, count)
        self._decoded: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Returns the images of an epoch, usable or not."""
        return len(self.reader.lanes)

    @property
    def skipped(self) -> int:
        """The number of images that could not be used, so far."""
        return len(self._known_bad)

    def batch(self, step: int, rows: slice) -> Batch:
        """Returns images of the global batch of a step; see `BatchSource`.

        Raises:
            ValueError: If an image or a file is not usable; it is named, with the reason.
        """
        rows = slice(*rows.indices(self.reader.lanes.batch_size)[:2])
        if self._decoded is None or self._next != (step, rows):
            self._jobs.start(step, rows)
            self._decoded = iter(self._loader)
        self._next = None  # unless all goes well
        try:
            images, bad = next(self._decoded)
        except RuntimeError as error:
            raise OSError(f"a process that decodes images has ended: {one_line(error)}") from error
        picks, places = self._jobs.under_way.popleft()
        if isinstance(picks, ValueError):
            raise picks
        for row, reason in bad:
            picks[row], images[row] = self._stand_in(picks[row], reason, places[row])
        self._next = step + 1, rows
        return Batch(self._sent(torch.from_numpy(images)), self._labels(picks))

    def close(self) -> None:
        """Ends the processes and threads."""
        self._decoded = self._next = None
        self._loader = decoding(self.form, self._jobs, 0)  # the workers end with the loader that has them
        self._jobs.under_way.clear()
        self.reader.close()

    def _labels(self, picks: list[Pick]) -> Tensor | None:
        if self.reader.classes is None:
            return None
        return self._sent(torch.tensor([pick.window.labels[pick.row] for pick in picks], dtype=torch.int64))

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _stand_in(self, pick: Pick, reason: str, place: Place) -> tuple[Pick, np.ndarray]:
        """Returns the next usable image of the window of a bad one, or raises what is wrong with that."""
        window = pick.window
        self._note(BadImage(*window.origins[pick.row], reason))
        for further in range(1, len(window.images)):
            row = (pick.row + further) % len(window.images)
            image = attempt(window.images[row], self.form)
            if not isinstance(image, str):
                return Pick(window, row), crop_at(image, self.form, place)
            self._note(BadImage(*window.origins[row], image))
        path, row = window.origins[pick.row]
        raise ValueError(f"none of {len(window.images)} images is usable, such as row {row} of {path!r}: {reason}")

    def _note(self, bad: BadImage) -> None:
        if not self.skip_bad_images:
            raise bad.refusal(self.reader.column)
        key = (bad.file, bad.row)
        if key not in self._known_bad:
            self._known_bad.add(key)
            if self.report is not None:
                append_line(self.report, asdict(bad))


def open_stream(
    name: str,
    *,
    seed: int,
    batch_size: int,
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
    skip_bad_images: bool = False,
    report: Path | None = None,
    device: torch.device | str = "cpu",
    lanes: int = 8,
    window_rows: int = 1024,
    workers: int | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> ImageStream:
    """Opens a data set of parquet files as a stream; nothing is fetched but what the files say about themselves.

    Args:
        name: A folder of parquet files, a parquet file, an id on the Hub, or a URL or pattern; see `find_shards`.
        seed: Seed of the run.
        batch_size: Images in a global batch, over all processes.
        split: Name of the split.
        column: Column of the images; guessed if None.
        resolution: Height and width that images are fitted to, in pixels, or one number for both.
        channels: 1, 3 or 4, or the number that arrays have.
        levels: Evenly spaced values of a pixel; above 256 images have 16 bits.
        crop: `center` or `random`.
        enlarge: Whether images that are smaller than the resolution are scaled up, not refused.
        value_range: The floats that become black and white, for images of floats.
        config: Configuration, for data sets with several ones.
        class_column: Column of the classes, or `auto` to guess it. If it does not name its classes, it is read wholly.
        max_samples: How many images to use: random groups of rows, and of the last one the first rows.
        skip_bad_images: Whether to go on over images that cannot be used.
        report: File to which these are added, as lines of JSON.
        device: Where batches are wanted.
        lanes: See `Lanes`; at least the number of processes, so that none reads much that others use.
        window_rows: See `Lanes`; about `2 * lanes * window_rows` encoded images are held, over all processes.
        workers: Processes that decode; by default one a core, up to 8.
        log: Called with a line on files of a folder that are not used.

    Returns:
        The images.

    Raises:
        ValueError: If the data set or a column is not usable; each is named, with the reason.
    """
    form = ImageFormat.of(resolution, channels, levels=levels, crop=crop, enlarge=enlarge, value_range=value_range)
    paths, left_out = find_shards(name, split, config, log)
    shards = Shards(paths)
    column = find_image_column(shards.sample(), column)
    classes = None
    if class_column is not None:
        class_column = find_class_column(shards.features, class_column)
        classes = find_classes(shards.features, class_column, shards.values(class_column))
    groups = shards.some(max_samples, seed)
    plan = Lanes(seed, batch_size, [group.rows for group in groups], lanes=lanes, window_rows=window_rows)
    reader = WindowReader(groups, plan, column, classes)
    if report is not None:
        listed = read_report(report)
        for file in left_out:
            if (file.file, None) not in listed:
                append_line(report, asdict(BadImage(file.file, None, file.reason)))
    return ImageStream(reader, form, device=device, skip_bad_images=skip_bad_images, report=report, workers=workers)


class _Jobs:
    """What is to be decoded: the rows of one step after another, and where they are cut."""

    def __init__(self, reader: WindowReader, form: ImageFormat):
        self.reader, self.form = reader, form
        self.under_way: deque[tuple[list[Pick] | ValueError, list[Place]]] = deque()
        self.start(0, slice(0, 0))

    def start(self, step: int, rows: slice) -> None:
        """Sets the step and rows that the next iteration begins with."""
        self.step, self.rows = step, rows
        self.under_way.clear()

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any] | None], list[Place]]]:
        """Yields encoded images and places; waits for what is not read yet."""
        step = self.step
        while True:
            try:
                picks = self._picks(step)
            except ValueError as error:
                # It is raised when its step has come.
                self.under_way.append((error, []))
                yield [], []
            else:
                places = self._places(step, len(picks))
                self.under_way.append((picks, places))
                yield [pick.window.images[pick.row] for pick in picks], places
            step += 1

    def _picks(self, step: int) -> list[Pick]:
        stretches = self.reader.lanes.stretches(step, self.rows)
        requests = [self.reader.request(stretch.window) for stretch in stretches]  # all, before one is waited for
        windows = [request.result() for request in requests]
        return [
            Pick(window, row)
            for window, stretch in zip(windows, stretches, strict=True)
            for row in range(stretch.start, stretch.stop)
        ]

    def _places(self, step: int, count: int) -> list[Place]:
        if self.form.crop == "center":
            return [(0.0, 0.0)] * count
        lanes = self.reader.lanes
        return crop_places(lanes.seed, step, lanes.batch_size)[self.rows].tolist()
