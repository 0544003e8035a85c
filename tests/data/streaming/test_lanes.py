import random

import pytest

from hf_ddpm.data.streaming.lanes import Lanes


def rows_of(lanes, step, rows):
    """Return the rows of a batch as (group, row)."""
    batch = []
    for window, start, stop in lanes.slices(step, rows):
        window_rows = [(piece.group, row) for piece in window.pieces for row in range(piece.start, piece.stop)]
        batch += [window_rows[index] for index in window.order(lanes.seed)[start:stop].tolist()]
    return batch


@pytest.mark.parametrize("trial", range(40))
def test_epochs_are_permutations_for_any_sizes(trial):
    draw = random.Random(trial)
    groups = [draw.randint(1, 20) for _ in range(draw.randint(1, 12))]
    batch = draw.randint(1, 40)
    lanes = Lanes(trial, batch, groups, lanes=draw.randint(1, 9), window_rows=draw.randint(1, 30))
    every = sorted((group, row) for group, size in enumerate(groups) for row in range(size))
    assert len(lanes) == len(every)
    stream = []
    for step in range(3 * len(every) // batch + 1):
        cut = draw.randint(0, batch)  # two processes
        both = rows_of(lanes, step, slice(0, cut)) + rows_of(lanes, step, slice(cut, batch))
        assert len(both) == batch
        stream += both
    epochs = [stream[epoch * len(every) : (epoch + 1) * len(every)] for epoch in range(3)]
    assert all(sorted(epoch) == every for epoch in epochs)
    if len(every) > 20:
        assert epochs[0] != epochs[1] != epochs[2]


def test_each_epoch_has_another_order_of_groups():
    # With one group per window, only the order of the groups changes.
    lanes = Lanes(0, 8, [10] * 20, lanes=1, window_rows=1)
    groups = [[group for step in range(25) for group, _ in rows_of(lanes, 25 * epoch + step, slice(0, 8))][::10]
              for epoch in range(3)]  # fmt: skip
    assert groups[0] != groups[1] != groups[2] != groups[0]


def test_row_order_depends_on_seed():
    first, second = (rows_of(Lanes(seed, 32, [10] * 20, lanes=8, window_rows=40), 3, slice(0, 32)) for seed in (0, 1))
    assert first != second


def test_process_reads_only_groups_of_its_lanes():
    lanes = Lanes(0, 64, [10] * 640, lanes=8, window_rows=40)
    steps = len(lanes) // 64
    read = [set(), set()]
    for process, rows in enumerate([slice(0, 32), slice(32, 64)]):
        for step in range(steps):
            for window, *_ in lanes.slices(step, rows):
                read[process] |= {piece.group for piece in window.pieces}
    assert len(read[0] | read[1]) == 640
    assert len(read[0] & read[1]) <= 1  # the group at the border between the lanes of both processes


def test_windows_have_minimum_number_of_rows():
    lanes = Lanes(0, 8, [10] * 100, lanes=2, window_rows=64)
    windows = {window for step in range(len(lanes) // 8) for window, *_ in lanes.slices(step, slice(0, 8))}
    sizes = sorted(window.rows for window in windows)
    assert all(64 <= size < 64 + 10 for size in sizes[2:])  # except the last window of each lane
    assert sum(sizes) == 1000


def test_window_after_last_one_is_in_next_epoch():
    lanes = Lanes(0, 8, [10] * 12, lanes=2, window_rows=20)
    window = lanes.slices(0, slice(0, 4))[0].window
    followed = []
    for _ in range(8):
        followed.append(window)
        window = lanes.after(window)
    seen = dict.fromkeys(
        part.window for step in range(50) for part in lanes.slices(step, slice(0, 4))
    )  # in order of use
    assert followed == list(seen)[:8]
    assert {window.epoch for window in followed} >= {0, 1}
