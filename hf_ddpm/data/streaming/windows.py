"""Windows of a stream, read in the background: the one in use and the next one of each lane."""

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
    """The rows of a window, in their shuffled order.

    Attributes:
        images: Encoded images, as `datasets` keeps them.
        labels: Their classes; empty if none were asked for.
        origins: The file and the row there that each comes from.
    """

    images: list[dict[str, Any] | None]
    labels: list[int]
    origins: list[tuple[str, int]]


class Pick(NamedTuple):
    """A row of a batch: its window and its place there."""

    window: LoadedWindow
    row: int


class WindowReader:
    """Reads windows, each once while it is in use, and ahead of that.

    Args:
        groups: The groups of rows.
        lanes: The plan.
        column: The column of the images.
        classes: The classes to read with them.
    """

    def __init__(self, groups: Sequence[RowGroup], lanes: Lanes, column: str, classes: Classes | None = None):
        self.groups, self.lanes, self.column, self.classes = groups, lanes, column, classes
        self._held: dict[int, dict[Window, Future[LoadedWindow]]] = {}
        # Without threads as long as nothing is read: processes may be forked until then.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="windows")

    def picks(self, step: int, rows: slice) -> list[Pick]:
        """Returns some rows of the global batch of a step; waits for what is not read yet.

        Raises:
            ValueError: If a file cannot be read, or a row has no class.
        """
        stretches = self.lanes.stretches(step, rows)
        requests = [self._request(stretch.window) for stretch in stretches]  # all, before one is waited for
        windows = [request.result() for request in requests]
        return [
            Pick(window, row)
            for window, stretch in zip(windows, stretches, strict=True)
            for row in range(stretch.start, stretch.stop)
        ]

    def close(self) -> None:
        """Ends the reading; what is being read is waited for."""
        self._readers.shutdown(cancel_futures=True)
        self._held.clear()

    def _request(self, window: Window) -> "Future[LoadedWindow]":
        """Returns the window to come, and has the next one of its lane read too."""
        held = self._held.setdefault(window.lane, {})
        for wanted in (window, self.lanes.after(window)):
            # Put last, and so let go last.
            held[wanted] = held.pop(wanted) if wanted in held else self._readers.submit(self._load, wanted)
        while len(held) > HELD_WINDOWS:
            del held[next(iter(held))]  # who has asked for it still gets it
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
