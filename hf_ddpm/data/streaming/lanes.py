r"""The rows of each batch of a set too large to shuffle, as a pure function of (seed, step): arithmetic only.

The set comes in groups of rows, which are read as a whole. Each epoch takes the groups in a random order, end to end,
and divides this sequence of rows into lanes, one for each stretch of the global batch. A lane is read in windows of
some groups, whose rows are shuffled. So a process, whose rows of the batch lie in some lanes only, reads little that
it does not use; and nothing has to be replayed to find a place.

Epochs are permutations of all rows, end to end, without a gap or a repetition, as those of images in memory: place `p`
of the stream of all batches, the row :math:`p \bmod B` of step :math:`\lfloor p / B \rfloor`, belongs to epoch
:math:`\lfloor p / N \rfloor`, and a lane has as many rows in an epoch as that epoch has places in its stretch.
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
    """Rows of a group, from `start` up to `stop`."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are read and shuffled together.

    Attributes:
        epoch: The epoch.
        lane: The lane.
        number: Its number in the lane, from 0.
        start: Its first place in the lane.
        pieces: What it consists of, before the shuffle.
    """

    epoch: int
    lane: int
    number: int
    start: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """The number of its rows."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def order(self, seed: int) -> Tensor:
        """Returns the shuffle: which of its rows stands at each place, int64, shape `(rows,)`."""
        return torch.randperm(self.rows, generator=generator(seed, ORDER, self.epoch, self.lane, self.number))


class Stretch(NamedTuple):
    """Places of a window, after its shuffle, from `start` up to `stop`."""

    window: Window
    start: int
    stop: int


class Lanes:
    """The plan of a stream.

    Args:
        seed: Seed of the run.
        batch_size: Images in a global batch.
        groups: The number of rows of each group, at least 1.
        lanes: Number of lanes that a batch is divided into; a process reads the lanes that its rows lie in.
        window_rows: Rows of a window at least, if a lane has so many: more are shuffled better and take more memory.
    """

    def __init__(self, seed: int, batch_size: int, groups: Sequence[int], *, lanes: int, window_rows: int):
        self.seed, self.batch_size, self.window_rows = seed, batch_size, window_rows
        self.groups = np.asarray(groups, dtype=np.int64)
        self.size = int(self.groups.sum())
        count = min(lanes, batch_size)
        self._edges = [lane * batch_size // count for lane in range(count + 1)]
        self._windows = lru_cache(maxsize=2)(self._divide)

    def __len__(self) -> int:
        """Returns the number of rows of all groups."""
        return self.size

    def stretches(self, step: int, rows: slice) -> list[Stretch]:
        """Returns what some rows of the global batch of a step consist of, in order.

        Args:
            step: Optimizer step, from 0.
            rows: Which rows of the batch: a slice with start and stop.

        Returns:
            Places in windows, as many as there are rows.
        """
        found: list[Stretch] = []
        for lane, (first, last) in enumerate(pairwise(self._edges)):
            start, stop = (step * self.batch_size + min(max(row, first), last) for row in (rows.start, rows.stop))
            while start < stop:
                epoch = start // self.size
                end = min(stop, (epoch + 1) * self.size)
                place = self._before(lane, start) - self._before(lane, epoch * self.size)
                found += self._cut(epoch, lane, place, place + end - start)
                start = end
        return found

    def after(self, window: Window) -> Window:
        """Returns the window that its lane goes on with, maybe in a later epoch."""
        epoch, number = window.epoch, window.number + 1
        while number >= len(self._windows(epoch)[window.lane]):
            epoch, number = epoch + 1, 0
        return self._windows(epoch)[window.lane][number]

    def _before(self, lane: int, place: int) -> int:
        """Returns how many places of the stream before `place` are in a lane."""
        first, last = self._edges[lane], self._edges[lane + 1]
        batches, row = divmod(place, self.batch_size)
        return batches * (last - first) + min(max(row, first), last) - first

    def _cut(self, epoch: int, lane: int, start: int, stop: int) -> list[Stretch]:
        windows = self._windows(epoch)[lane]
        number = int(np.searchsorted([window.start for window in windows], start, side="right")) - 1
        found = []
        while start < stop:
            window = windows[number]
            end = min(stop, window.start + window.rows)
            found.append(Stretch(window, start - window.start, end - window.start))
            start, number = end, number + 1
        return found

    def _divide(self, epoch: int) -> list[list[Window]]:
        """Returns the windows of all lanes in an epoch."""
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
    """Cuts rows `start` to `stop` out of groups that stand end to end, in this order."""
    pieces = []
    number = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        group, end = int(order[number]), int(ends[number])
        offset = end - int(sizes[group])
        pieces.append(Piece(group, start - offset, min(stop, end) - offset))
        start, number = min(stop, end), number + 1
    return pieces
