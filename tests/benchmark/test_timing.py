from statistics import median

import pytest

from hf_ddpm.benchmark.report import measured
from hf_ddpm.benchmark.timing import LEAST_SECONDS, Timed, Work, time_in_turns


class Stage:
    """A clock that only the works move, and the order of their turns."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def clock(self):
        return self.now

    def work(self, subject, durations, **more):
        left = iter(durations)

        def run():
            self.order.append(subject)
            self.now += next(left)

        return Work(subject, run, **{"images": 8, "unit": "pass", "at_once": True, **more})

    def leader(self, subject, durations, **more):
        def lead(others):
            self.now += 1000  # what comes before its first turn is nobody's time
            others()
            for duration in durations:
                self.order.append(subject)
                self.now += duration
                others()
            self.now += 1000

        return Work(subject, lambda: None, images=8, unit="step", lead=lead, **more)


def test_works_take_turns_and_the_first_round_does_not_count():
    stage = Stage()
    works = [stage.work("a", [99, 3, 1, 2]), stage.work("b", [77, 6, 8, 4], count=2)]
    first, second = time_in_turns(works, 3, stage.clock)
    assert stage.order == ["a", "b"] * 4
    assert first.seconds == [3, 1, 2]
    assert second.seconds == [3, 4, 2]  # of each of the two units


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_loop_of_its_own_leads_the_others_wherever_it_stands(at):
    stage = Stage()
    works = [stage.work("a", [99, 3, 1]), stage.work("b", [88, 5, 5])]
    works.insert(at, stage.leader("l", [77, 10, 20], count=10))
    timed = time_in_turns(works, 2, stage.clock)
    assert stage.order == [work.subject for work in works] * 3
    assert timed[at].seconds == [1, 2]
    assert [entry.seconds for i, entry in enumerate(timed) if i != at] == [[3, 1], [5, 5]]


def test_short_works_are_repeated():
    stage = Stage()
    (timed,) = time_in_turns([stage.work("a", [LEAST_SECONDS / 4] * 100, at_once=False)], 2, stage.clock)
    assert len(stage.order) == 2 + 3 * 4  # two to see how short it is
    assert timed.seconds == pytest.approx([LEAST_SECONDS / 4] * 2)


@pytest.mark.parametrize("lasts", [0, 1, 2])
def test_one_that_fails_takes_part_no_more(lasts):
    stage = Stage()
    timed = time_in_turns([stage.work("a", [1] * lasts), stage.work("b", [7, 2, 3])], 2, stage.clock)
    assert stage.order == ["a", "b"] * (lasts + 1) + ["b"] * (2 - lasts)
    assert timed[0].error == "StopIteration:" and timed[0].seconds == []
    assert timed[1].error is None and timed[1].seconds == [2, 3]


def test_a_leader_that_fails_leaves_the_others_their_turns():
    stage = Stage()

    def lead(others):
        others()
        raise MemoryError("out of\nmemory")

    works = [stage.work("a", [9, 2, 3]), Work("l", lambda: None, images=8, unit="step", lead=lead)]
    first, second = time_in_turns(works, 2, stage.clock)
    assert first.seconds == [2, 3] and first.error is None
    assert second.error == "MemoryError: out of memory"


def test_a_row_is_medians_and_shares():
    ours = Work("hf_ddpm", print, images=8, unit="pass"), Timed([1.0, 2.0, 6.0])
    theirs = Work("other", print, images=4, unit="pass", flops=60.0), Timed([3.0, 2.0, 8.0])
    row = measured("forward", *theirs, ours, {"matmul": 100.0, "convolution": 40.0})
    assert (row["seconds"]["median"], row["seconds"]["least"], row["seconds"]["most"]) == (3, 2, 8)
    assert row["seconds"]["rounds"] == [3, 2, 8]
    assert row["images_per_second"] == pytest.approx(4 / 3)
    # An image takes 3/4, 2/4 and 8/4 seconds; ours 1/8, 2/8 and 6/8.
    assert row["beside_ours"] == pytest.approx(median([6, 2, 8 / 3]))
    assert row["flops_per_second"] == pytest.approx(20)
    assert (row["of_matmul"], row["of_convolution"]) == pytest.approx((0.2, 0.5))
    failure = measured("forward", theirs[0], Timed(error="no"), ours, {})
    assert failure == {"task": "forward", "subject": "other", "error": "no"}
