"""Turns: what slows a machine down for a while slows all who are timed."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from time import perf_counter

import torch

Clock = Callable[[], float]

# A turn of works that are shorter is so many of them that it lasts this long, in seconds.
LEAST_SECONDS = 0.2
MOST_REPEATS = 1000


@dataclass
class Work:
    """What somebody does in a turn.

    Attributes:
        subject: Who.
        run: Does it once.
        images: Images that a unit of it is for, if any: of a step, a pass, a whole chain.
        unit: What that is called.
        count: Units in one run.
        flops: Operations of the matrix products and convolutions of a unit, if there are any.
        parameters: Those of the network.
        notes: What a reader must know to compare it.
        at_once: Whether one run makes a turn; short ones are repeated.
        lead: Does it in place of `run`, all turns in one call: a loop that calls what it is given when it is ready, and
            after each turn.
        close: Ends what works in the background.
    """

    subject: str
    run: Callable[[], object]
    images: int | None
    unit: str
    count: int = 1
    flops: float | None = None
    parameters: int | None = None
    notes: tuple[str, ...] = ()
    at_once: bool = False
    lead: Callable[[Callable[[], None]], None] | None = None
    close: Callable[[], object] = lambda: None


@dataclass
class Timed:
    """What came of a work.

    Attributes:
        seconds: Of a unit, one number a round.
        error: Why it failed, if it did.
    """

    seconds: list[float] = field(default_factory=list)
    error: str | None = None


def clock_of(device: torch.device) -> Clock:
    """Returns a clock that waits for the device before it tells the time, in seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    return now


def reason(error: Exception) -> str:
    """Returns an error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def time_in_turns(
    works: Sequence[Work], rounds: int, clock: Clock, tell: Callable[[str], object] = lambda who: None
) -> list[Timed]:
    """Times works A, B as A B A B ...; the first round is to warm up and does not count.

    Args:
        works: The works; at most one of them leads.
        rounds: Rounds that count.
        clock: Tells the time once all that was begun is done.
        tell: Told whose turn it is.

    Returns:
        What came of each. One that fails takes part no more.
    """
    timed = [Timed() for _ in works]
    leader = next((i for i, work in enumerate(works) if work.lead is not None), None)
    repeats = [
        1 if leader is not None or work.at_once else _repeats(work, clock, entry)
        for work, entry in zip(works, timed, strict=True)
    ]
    turns = _turns(rounds + 1, clock, [entry.seconds for entry in timed])

    def others() -> None:
        """Gives turns to others until it is the leader's."""
        for i in turns:
            tell(f"{works[i].subject}, round {len(timed[i].seconds)} of {rounds}")
            if i == leader and timed[i].error is None:
                return
            if timed[i].error is None:
                _attempt(works[i].run, repeats[i], timed[i])

    if leader is not None:
        lead = works[leader].lead
        assert lead is not None
        _attempt(lambda: lead(others), 1, timed[leader])
    others()
    for work, entry, times in zip(works, timed, repeats, strict=True):
        units = times * work.count
        entry.seconds = [] if entry.error else [seconds / units for seconds in entry.seconds[1:]]
    return timed


@contextmanager
def unseen() -> Iterator[None]:
    """Lets the bars of others be drawn, which costs what it costs, but not shown."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield


def _turns(rounds: int, clock: Clock, seconds: Sequence[list[float]]) -> Iterator[int]:
    """Yields whose turn it is, and notes how long it took until the next one was asked for."""
    for _ in range(rounds):
        for i, noted in enumerate(seconds):
            start = clock()
            yield i
            noted.append(clock() - start)


def _repeats(work: Work, clock: Clock, entry: Timed) -> int:
    """Returns how many runs make a turn."""
    _attempt(work.run, 1, entry)
    start = clock()
    if entry.error is None:
        _attempt(work.run, 1, entry)
    return max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS / max(clock() - start, 1e-9))))


def _attempt(run: Callable[[], object], times: int, entry: Timed) -> None:
    try:
        for _ in range(times):
            run()
    except Exception as error:  # whatever others raise is a line of the table
        entry.error = reason(error)
