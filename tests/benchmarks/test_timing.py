from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import pytest

from benchmarks.measure import LEAST_SECONDS, Workload, time_in_turns
from benchmarks.report import to_row


class Stage:
    """A clock that only workloads advance, and a record of the order of turns."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def clock(self):
        return self.now

    def work(self, subject, durations, **more):
        left = iter(durations)

        def run():
            self.order.append(subject)
            self.now += next(left)

        return Workload(subject, run, **{"images": 8, "unit": "pass", "at_once": True, **more})

    def leader(self, subject, durations, **more):
        def lead(others):
            self.now += 1000  # time before the first turn does not count
            others()
            for duration in durations:
                self.order.append(subject)
                self.now += duration
                others()
            self.now += 1000

        return Workload(subject, lambda: None, images=8, unit="step", lead=lead, **more)


def time_all(stage, works, rounds, **more):
    time_in_turns(works, rounds, stage.clock, lambda turn: None, **more)
    return [work.seconds for work in works]


def test_workloads_take_turns_and_first_round_does_not_count():
    stage = Stage()
    works = [stage.work("a", [99, 3, 1, 2]), stage.work("b", [77, 6, 8, 4], count=2)]
    assert time_all(stage, works, 3) == [[3, 1, 2], [3, 4, 2]]  # b has two units per run
    assert stage.order == ["a", "b"] * 4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_leading_loop_gives_turns_to_others_in_any_order(at):
    stage = Stage()
    works = [stage.work("a", [99, 3, 1]), stage.work("b", [88, 5, 5])]
    works.insert(at, stage.leader("l", [77, 10, 20], count=10))
    seconds = time_all(stage, works, 2)
    assert stage.order == [work.subject for work in works] * 3
    assert seconds.pop(at) == [1, 2]
    assert seconds == [[3, 1], [5, 5]]


def test_short_workloads_are_repeated():
    stage = Stage()
    (seconds,) = time_all(stage, [stage.work("a", [LEAST_SECONDS / 4] * 100, at_once=False)], 2)
    assert len(stage.order) == 2 + 3 * 4  # two runs to measure the duration
    assert seconds == pytest.approx([LEAST_SECONDS / 4] * 2)


@pytest.mark.parametrize("lasts", [0, 1, 2])
def test_failed_workload_takes_no_further_turns(lasts):
    stage = Stage()
    works = [stage.work("a", [1] * lasts), stage.work("b", [7, 2, 3])]
    assert time_all(stage, works, 2) == [[], [2, 3]]
    assert stage.order == ["a", "b"] * (lasts + 1) + ["b"] * (2 - lasts)
    assert [work.error for work in works] == ["StopIteration:", None]


def test_workload_that_failed_before_gets_no_turn():
    stage = Stage()
    assert time_all(stage, [stage.work("a", [1], error="no"), stage.work("b", [7, 2])], 1) == [[], [2]]
    assert stage.order == ["b", "b"]


def test_others_take_their_turns_after_leader_fails():
    stage = Stage()

    def lead(others):
        others()
        raise MemoryError("out of\nmemory")

    works = [stage.work("a", [9, 2, 3]), Workload("l", images=8, unit="step", lead=lead)]
    assert time_all(stage, works, 2) == [[2, 3], []]
    assert [work.error for work in works] == [None, "MemoryError: out of memory"]


def test_first_run_includes_building_workload():
    stage = Stage()
    works = [stage.work("a", [99, 3]), stage.leader("l", [77, 10]), stage.work("b", [88, 5])]
    for work in works:
        work.first = 7  # built in seven seconds
    time_all(stage, works, 1)
    assert [work.first for work in works] == [
        7 + 99,
        7 + 1000 + 77,
        7 + 88,
    ]  # the leader prepares for 1000 s
    work = stage.work("c", [50, *[LEAST_SECONDS / 4] * 100], at_once=False)
    time_all(stage, [work], 1)
    assert work.first == 50
    assert to_row("forward", replace(work, first=8.0), None, {})["first_run_seconds"] == 8


@pytest.mark.parametrize("at", [0, 1])
def test_profiled_workloads_have_untimed_last_turn(at):
    stage, inside = Stage(), []

    @contextmanager
    def profiled(work):
        before = len(stage.order)
        yield
        inside.extend(stage.order[before:])

    def profile_of(work):
        return profiled(work) if work.subject in ("a", "l") else None

    works = [stage.work("a", [9, 3], brief=lambda: stage.order.append("brief")), stage.work("b", [9, 4])]
    assert time_all(stage, works, 1, profiled=profile_of) == [[3], [4]]
    assert inside == ["brief"] and stage.order == ["a", "b", "a", "b", "brief"]

    stage.order.clear(), inside.clear()
    works = [stage.work("b", [9, 4])]
    works.insert(at, stage.leader("l", [9, 5, 1]))  # one more step
    seconds = time_all(stage, works, 1, profiled=profile_of)
    assert seconds.pop(at) == [5] and seconds == [[4]]
    assert inside == ["l"] and stage.order[-1] == "l"


def test_row_contains_medians_and_shares():
    ours = Workload("hf_ddpm", images=8, unit="pass", seconds=[1.0, 2.0, 6.0])
    theirs = Workload("other", images=4, unit="pass", flops=60.0, seconds=[3.0, 2.0, 8.0])
    row = to_row("forward", theirs, ours, {"matmul": 100.0, "convolution": 40.0})
    assert (row["seconds"]["median"], row["seconds"]["least"], row["seconds"]["most"]) == (3, 2, 8)
    assert row["seconds"]["rounds"] == [3, 2, 8]
    assert row["images_per_second"] == pytest.approx(4 / 3)
    # An image takes 3/4, 2/4 and 8/4 seconds; ours 1/8, 2/8 and 6/8.
    assert row["beside_ours"] == pytest.approx(median([6, 2, 8 / 3]))
    assert row["flops_per_second"] == pytest.approx(20)
    assert (row["of_matmul"], row["of_convolution"]) == pytest.approx((0.2, 0.5))
    failure = to_row("forward", Workload("other", error="no"), ours, {})
    assert failure == {"task": "forward", "subject": "other", "error": "no"}
