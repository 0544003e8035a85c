r"""Row order of a stream as a pure function of (seed, step), without shuffling the whole dataset.

The dataset consists of row groups, each read as a whole. Each epoch concatenates the groups in a random order and
divides the resulting sequence of rows into lanes. Each lane fills a fixed range of rows of the global batch. A lane is
read in windows of a few groups, and the rows of a window are shuffled. The rows of a process belong to few lanes, so it
reads little that it does not use. Resuming at any step needs no replay.

As for images in memory, each epoch is a permutation of all rows, and epochs follow each other without a gap. Position
`p` of the stream of all batches is row :math:`p \bmod B` of step :math:`\lfloor p / B \rfloor` and belongs to epoch
:math:`\lfloor p / N \rfloor`. The number of rows of a lane in an epoch is the number of positions of the epoch that are
in the range of the lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.utils.seeds import ORDER, generator


class Piece(NamedTuple):
    """Rows of a group, from `start` to `stop`, exclusive."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are read and shuffled together.

    Attributes:
        epoch: The epoch.
        lane: The lane.
        number: Index of the window in the lane, from 0.
        start: Position of its first row in the lane.
        pieces: Its rows, before the shuffle.
    """

    epoch: int
    lane: int
    number: int
    start: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def order(self, seed: int) -> Tensor:
        """Return the shuffled order: the row at each position, int64, shape `(rows,)`."""
        return torch.randperm(self.rows, generator=generator(seed, ORDER, self.epoch, self.lane, self.number))


class WindowSlice(NamedTuple):
    """Positions in a shuffled window, from `start` to `stop`, exclusive."""

    window: Window
    start: int
    stop: int


class Lanes:
    """The row order of a stream.

    Args:
        seed: Seed of the run.
        batch_size: Images per global batch.
        groups: The number of rows of each group, at least 1.
        lanes: Number of lanes; a process reads the lanes of its rows of the batch.
        window_rows: Minimum rows per window, except in short lanes. More rows shuffle better but need more memory.
    """

    def __init__(self, seed: int, batch_size: int, groups: Sequence[int], *, lanes: int, window_rows: int):
        self.seed, self.batch_size, self.window_rows = seed, batch_size, window_rows
        self.groups = np.asarray(groups, dtype=np.int64)
        self.size = int(self.groups.sum())
        count = min(lanes, batch_size)
        self._edges = [lane * batch_size // count for lane in range(count + 1)]
        self._windows = lru_cache(maxsize=2)(self._divide)

    def __len__(self) -> int:
        """Return the number of rows of all groups."""
        return self.size

    def slices(self, step: int, rows: slice) -> list[WindowSlice]:
        """Return the positions in windows of some rows of a global batch, in order.

        Args:
            step: Optimizer step, from 0.
            rows: Rows of the batch: a slice with start and stop.

        Returns:
            Positions in windows, one per row.
        """
        slices: list[WindowSlice] = []
        for lane, (first, last) in enumerate(pairwise(self._edges)):
            start, stop = (step * self.batch_size + min(max(row, first), last) for row in (rows.start, rows.stop))
            while start < stop:
                epoch = start // self.size
                end = min(stop, (epoch + 1) * self.size)
                position = self._before(lane, start) - self._before(lane, epoch * self.size)
                slices += self._cut(epoch, lane, position, position + end - start)
                start = end
        return slices

    def after(self, window: Window) -> Window:
        """Return the next window of the lane, which may be in a later epoch."""
        epoch, number = window.epoch, window.number + 1
        while number >= len(self._windows(epoch)[window.lane]):
            epoch, number = epoch + 1, 0
        return self._windows(epoch)[window.lane][number]

    def _before(self, lane: int, position: int) -> int:
        """Return the number of positions of a lane before `position` of the stream."""
        first, last = self._edges[lane], self._edges[lane + 1]
        batches, row = divmod(position, self.batch_size)
        return batches * (last - first) + min(max(row, first), last) - first

    def _cut(self, epoch: int, lane: int, start: int, stop: int) -> list[WindowSlice]:
        windows = self._windows(epoch)[lane]
        number = int(np.searchsorted([window.start for window in windows], start, side="right")) - 1
        slices = []
        while start < stop:
            window = windows[number]
            end = min(stop, window.start + window.rows)
            slices.append(WindowSlice(window, start - window.start, end - window.start))
            start, number = end, number + 1
        return slices

    def _divide(self, epoch: int) -> list[list[Window]]:
        """Return the windows of all lanes in an epoch."""
        order = torch.randperm(len(self.groups), generator=generator(self.seed, ORDER, epoch)).numpy()
        ends = self.groups[order].cumsum()
        lanes, taken = [], 0
        for lane in range(len(self._edges) - 1):
            length = self._before(lane, (epoch + 1) * self.size) - self._before(lane, epoch * self.size)
            lanes.append(self._windows_of(epoch, lane, _pieces(order, self.groups, ends, taken, taken + length)))
            taken += length
        return lanes

    def _windows_of(self, epoch: int, lane: int, pieces: list[Piece]) -> list[Window]:
        windows: list[Window] = []
        start = rows = 0
        held: list[Piece] = []
        for number, piece in enumerate(pieces):
            held.append(piece)
            rows += piece.stop - piece.start
            if rows >= self.window_rows or number == len(pieces) - 1:
                windows.append(Window(epoch, lane, len(windows), start, tuple(held)))
                start, rows, held = start + rows, 0, []
        return windows


def _pieces(order: np.ndarray, sizes: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[Piece]:
    """Return rows `start` to `stop` of the groups concatenated in this order."""
    pieces = []
    number = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        group, end = int(order[number]), int(ends[number])
        offset = end - int(sizes[group])
        pieces.append(Piece(group, start - offset, min(stop, end) - offset))
        start, number = min(stop, end), number + 1
    return pieces
