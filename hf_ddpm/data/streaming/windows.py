"""Read the windows of a stream in the background: the current and the next one of each lane."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_ddpm.data.columns import Classes
from hf_ddpm.data.streaming.lanes import Lanes, Window
from hf_ddpm.data.streaming.shards import RowGroup

READERS = 4
HELD_WINDOWS = 2


@dataclass(frozen=True)
class LoadedWindow:
    """The rows of a window, in shuffled order.

    Attributes:
        images: Encoded images, as `datasets` stores them.
        labels: Their classes; empty without a class column.
        origins: The file of each image, and its row in the file.
    """

    images: list[dict[str, Any] | None]
    labels: list[int]
    origins: list[tuple[str, int]]


class Pick(NamedTuple):
    """A row of a batch: its window and its row in the window."""

    window: LoadedWindow
    row: int


class WindowReader:
    """Read and cache windows, and prefetch the next one of each lane.

    Args:
        groups: The row groups.
        lanes: The row order.
        column: The image column.
        classes: The classes to read with the images.
    """

    def __init__(self, groups: Sequence[RowGroup], lanes: Lanes, column: str, classes: Classes | None = None):
        self.groups, self.lanes, self.column, self.classes = groups, lanes, column, classes
        self._held: dict[int, dict[Window, Future[LoadedWindow]]] = {}
        # Threads start with the first read, so processes can be forked before it.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="windows")

    def picks(self, step: int, rows: slice) -> list[Pick]:
        """Return some rows of the global batch of a step; wait until they are read.

        Raises:
            ValueError: If a file cannot be read, or a row has no class.
        """
        slices = self.lanes.slices(step, rows)
        requests = [self._request(part.window) for part in slices]  # start all reads before waiting
        windows = [request.result() for request in requests]
        return [
            Pick(window, row)
            for window, part in zip(windows, slices, strict=True)
            for row in range(part.start, part.stop)
        ]

    def close(self) -> None:
        """Stop reading; wait for running reads."""
        self._readers.shutdown(cancel_futures=True)
        self._held.clear()

    def _request(self, window: Window) -> "Future[LoadedWindow]":
        """Return the future of a window, and start to read the next window of its lane."""
        held = self._held.setdefault(window.lane, {})
        for each in (window, self.lanes.after(window)):
            # Reinserted at the end, so that the least recently used window is dropped first.
            held[each] = held.pop(each) if each in held else self._readers.submit(self._load, each)
        while len(held) > HELD_WINDOWS:
            del held[next(iter(held))]  # callers that hold its future still get it
        return held[window]

    def _load(self, window: Window) -> LoadedWindow:
        images: list[dict[str, Any] | None] = []
        labels: list[int] = []
        origins: list[tuple[str, int]] = []
        for piece in window.pieces:
            group, rows = self.groups[piece.group], slice(piece.start, piece.stop)
            table = group.read([self.column, *([self.classes.column] if self.classes else [])])[rows]
            values = table[self.column].to_pylist()
            images += [{"bytes": value, "path": None} if isinstance(value, bytes) else value for value in values]
            first = group.first_row + piece.start
            origins += [(group.path, first + row) for row in range(len(table))]
            if self.classes is not None:
                values = table[self.classes.column].to_pylist()
                labels += self.classes.encode(values, range(first, first + len(values))).tolist()
        order = window.order(self.lanes.seed).tolist()
        return LoadedWindow(*([column[row] for row in order if column] for column in (images, labels, origins)))
