"""How a script starts and ends, and which cores are its own."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from filelock import FileLock, Timeout


class Interrupted(KeyboardInterrupt):
    """A signal that ends what is being done.

    Args:
        number: Which one.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handles a signal by raising `Interrupted`."""
    raise Interrupted(number)


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a script's `main` and exits with its code.

    A wrong input, a `ValueError`, is one line and code 2; a failing disk or a diverged run is one line and code 1;
    SIGTERM and Ctrl-C are one line and code 128 + their number.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a sign must not cost the work
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except Interrupted as interrupted:
        print(f"{name}: stopped by {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.number)


def use_own_cores() -> None:
    """Gives this process its share of the cores that the machine lets it use.

    `accelerate launch` and torchrun start every process with one thread, even the only process of a large machine. To
    have fewer threads, set OMP_NUM_THREADS to 2 or more, or start the process without a launcher.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(own_cores())


def own_cores() -> int:
    """Returns this process's share of the cores that the machine lets it use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def sole_run(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Keeps a second run out of the folder that `option` names, with a `ValueError` for it."""
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{option}={str(folder)!r} is in use by another run") from None
    with held:
        yield
