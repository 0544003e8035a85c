"""Measure times in turns, rates of a device, and peak memory."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

Clock = Callable[[], float]
Rates = dict[str, float]

# Short workloads are repeated until a turn takes this many seconds.
LEAST_SECONDS = 0.2
MOST_REPEATS = 1000
# A rate is the fastest of this many runs.
TRIALS = 15


def _nothing() -> None:
    pass


@dataclass
class Workload:
    """The work of a contender in a turn, and its measured times.

    Attributes:
        subject: Name of the contender.
        run: Function that does the work once.
        images: Images per unit (a step, a pass, a reverse process), if the work processes images.
        unit: Name of the unit.
        count: Units per run.
        flops: Operations of matrix products and convolutions per unit, if there is a network.
        parameters: Number of parameters of the network.
        notes: Notes for the report.
        at_once: If true, a turn is a single run; otherwise short runs are repeated.
        lead: Used instead of `run` for a loop that takes all turns in one call; it calls its argument before the first
            turn and after each turn.
        close: Function that ends background work.
        precision: Precision of the network: `no`, `bf16` or `fp16`.
        brief: Short run to profile instead of `run`; with `lead`, one unit is profiled.
        brief_steps: Steps or passes of the network in the profiled run.
        error: Error message if the work failed.
        first: Seconds from building the workload to the end of its first run, including compilation.
        seconds: Seconds per unit, one number per round.
        profile: The profile, if measured.
    """

    subject: str
    run: Callable[[], object] = _nothing
    images: int | None = None
    unit: str = ""
    count: int = 1
    flops: float | None = None
    parameters: int | None = None
    notes: tuple[str, ...] = ()
    at_once: bool = False
    lead: Callable[[Callable[[], None]], None] | None = None
    close: Callable[[], object] = _nothing
    precision: str | None = None
    brief: Callable[[], object] | None = None
    brief_steps: int = 1
    error: str | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    profile: dict[str, Any] | None = None

    def attempt(self, run: Callable[[], object], times: int = 1) -> None:
        """Run a function; after an error, which is stored, the workload takes no further turns."""
        try:
            for _ in range(0 if self.error else times):
                run()
        except Exception as error:  # any error of other libraries becomes a row of the table
            self.error = reason(error)


def clock_of(device: torch.device) -> Clock:
    """Return a clock, in seconds, that waits for the device."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    return now


def reason(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def time_in_turns(
    works: Sequence[Workload],
    rounds: int,
    clock: Clock,
    log: Callable[[str], object],
    profiled: Callable[[Workload], AbstractContextManager[None] | None] = lambda work: None,
) -> None:
    """Time workloads A and B in the order A B A B ..., so that a slow machine affects all of them equally.

    The first round is a warm-up and does not count. A workload that fails takes no further turns.

    Args:
        works: The workloads, at most one with `lead`; sets `seconds` and `error`, and adds the first run to `first`.
        rounds: Number of timed rounds.
        clock: Function that returns the time after all started work is done.
        log: Called with the name of each turn.
        profiled: Function that returns a context for a last short turn of a workload, which is not timed; or None for
            no such turn.
    """
    leader = next((i for i, work in enumerate(works) if work.lead is not None), None)
    one_run = [leader is not None or work.at_once for work in works]
    repeats = [1 if once else _repeats(work, clock) for work, once in zip(works, one_run, strict=True)]
    turns, starts = _turns(rounds + 1, clock, works, profiled), [clock()]

    def others() -> None:
        """Run the turns of the other workloads until it is the leader's turn."""
        if leader is not None and starts:
            works[leader].first += clock() - starts.pop()
        for i in turns:
            done = len(works[i].seconds)
            log(f"{works[i].subject}, round {done} of {rounds}" if done <= rounds else f"{works[i].subject}, profile")
            if i == leader and works[i].error is None:
                return
            if done <= rounds:
                works[i].attempt(works[i].run, repeats[i])
            else:
                works[i].attempt(works[i].brief or works[i].run)

    if leader is not None:
        works[leader].attempt(lambda: works[leader].lead(others))  # type: ignore[misc]
    others()
    for work, times, once in zip(works, repeats, one_run, strict=True):
        work.first += work.seconds[0] if once else 0
        work.seconds = [] if work.error else [seconds / (times * work.count) for seconds in work.seconds[1:]]


@contextmanager
def hidden_output() -> Iterator[None]:
    """Hide the output of all contenders; progress bars are still drawn, at their usual cost."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the operations per second of a large matrix product and of a large 3x3 convolution, each on its own."""
    large, clock = device.type == "cuda", clock_of(device)
    side = 8192 if large else 1024
    batch, channels, size = (256, 256, 32) if large else (16, 128, 32)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def fastest(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(TRIALS):
            start = clock()
            run()
            seconds.append(clock() - start)
        return min(seconds)

    a, b = random(side, side), random(side, side)
    x, kernel = random(batch, channels, size, size), random(channels, channels, 3, 3)
    convolutions = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x, kernel = x.contiguous(memory_format=layout), kernel.contiguous(memory_format=layout)
        convolutions.append(fastest(lambda x=x, kernel=kernel: F.conv2d(x, kernel, padding=1)))
    return {
        "matmul": 2 * side**3 / fastest(lambda: a @ b),
        "convolution": 2 * 9 * channels * x.numel() / min(convolutions),
    }


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory since the start of the block, above the initial memory, in bytes.

    On a GPU, memory allocated by torch; otherwise, resident memory of the process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        yield lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Return an entry of Linux's status of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _turns(
    rounds: int,
    clock: Clock,
    works: Sequence[Workload],
    profiled: Callable[[Workload], AbstractContextManager[None] | None],
) -> Iterator[int]:
    """Yield the index of each turn's workload, and record the seconds until the next turn is requested."""
    for _ in range(rounds):
        for i, work in enumerate(works):
            start = clock()
            yield i
            work.seconds.append(clock() - start)
    for i, work in enumerate(works):
        context = None if work.error else profiled(work)
        if context is not None:
            with context:
                yield i


def _repeats(work: Workload, clock: Clock) -> int:
    """Return the number of runs per turn."""
    start = clock()
    work.attempt(work.run)
    work.first += clock() - start
    start = clock()
    work.attempt(work.run)
    return max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS / max(clock() - start, 1e-9))))
