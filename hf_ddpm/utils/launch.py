"""Signals, exit codes, CPU cores and folder locks of scripts. Fast to import."""

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from hf_ddpm.utils.files import one_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds until a signal is raised again if its exception was lost.
AGAIN = 0.5


class Interrupted(KeyboardInterrupt):
    """Raised by a signal to stop the program.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGTERM and SIGINT as one flag, which raises `Interrupted` at once or is deferred.

    An exception raised by a signal handler can get lost: in a callback of the interpreter, or in a library that
    catches all exceptions. So the flag stays set, and `Interrupted` is raised again until `settle` is called.

    Attributes:
        number: Number of the signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._is_deferred = False
        self._previous: list[dict[int, Any]] = []

    @contextmanager
    def handled(self, deferred: bool = False) -> Iterator[None]:
        """Handle signals, and restore the previous handlers at the end; outside the main thread, do nothing.

        Args:
            deferred: If true, a signal only sets the flag. A second SIGINT still raises `Interrupted`.
        """
        before = self._is_deferred
        handlers: dict[int, Any] = dict.fromkeys(SIGNALS, self._receive)
        if hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, self._raise_again):
            handlers[signal.SIGALRM] = self._raise_again
        previous: dict[int, Any] = {}
        try:
            try:
                for number, handler in handlers.items():
                    previous[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread
                pass
            if deferred and previous and previous[signal.SIGTERM] != self._receive:
                self.settle()  # clear a signal of an earlier call in the same process, such as in a notebook
            self._is_deferred = deferred
            yield
        finally:
            self._is_deferred = before
            for number, handler in previous.items():
                if number == signal.SIGALRM and handler == signal.SIG_DFL:
                    self._stop_timer()
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` at once within a block that defers signals, also for a signal received before."""
        before, self._is_deferred = self._is_deferred, False
        try:
            if self.number:
                self._raise()
            yield
        finally:
            self._is_deferred = before

    def settle(self) -> None:
        """Clear the flag after the signal has been handled."""
        self.number = 0
        self._stop_timer()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = bool(self.number) and number == signal.SIGINT
        self.number = number
        if not self._is_deferred or is_second:
            self._raise()

    def _raise(self) -> NoReturn:
        if signal.getsignal(getattr(signal, "SIGALRM", signal.SIGTERM)) == self._raise_again:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise Interrupted(self.number)

    def _raise_again(self, number: int, frame: FrameType | None) -> None:
        if not self.number or self._is_deferred:
            return
        if _is_unwinding(sys.exception()):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)  # do not interrupt the cleanup that is running now
        else:
            self._raise()

    def _stop_timer(self) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


signals = Signals()


def end_quietly() -> None:
    """Let signals end the process without a traceback; for scripts, before slow imports."""

    def end(number: int, frame: FrameType | None) -> None:
        # Imports may catch exceptions, and there is nothing to save yet.
        os.write(2, f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main`, and exit with its code.

    Expected errors are printed in one line: an invalid input (`ValueError`) exits with code 2; an I/O error, a
    diverged run or a lack of memory with code 1; SIGTERM and Ctrl-C with code 128 + the number of the signal, even if
    a library has caught or replaced the exception.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show must not stop the program
    name = Path(sys.argv[0]).name
    hook, sys.unraisablehook = sys.unraisablehook, _hide_interrupted(sys.unraisablehook)
    signals.settle()
    try:
        with signals.handled():
            code = _exit_code(main, name)
    finally:
        sys.unraisablehook = hook
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the work is done: keep the exit code
    sys.exit(code)


def _is_closed(stream: Any) -> bool:
    """Return whether the reader of an output stream has closed it; if so, discard all further output."""
    if not hasattr(select, "poll"):  # Windows
        return False
    number, poll = stream.fileno(), select.poll()
    poll.register(number, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return is_closed


def _exit_code(main: Callable[[list[str]], int], name: str) -> Any:
    line: str | None = None
    try:
        code: Any = main(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit as error:  # raised by --help
        code = error.code
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
            return 128 + signal.SIGPIPE  # as other programs in `program | head`
        code, line = 2 if isinstance(error, ValueError) else 1, f"error: {one_line(error)}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Training errors already list options that need less memory.
        hint = one_line(error) if error.__cause__ else f"use a smaller batch size or network ({one_line(error)})"
        code, line = 1, f"error: not enough memory; {hint}"
    except Interrupted as interrupted:
        signals.number = signals.number or interrupted.number
        code = 128 + signals.number
    except BaseException:
        if not signals.number:  # otherwise a library has replaced the exception of the signal
            raise
        code = 1
    if signals.number:
        number = signals.number
        signals.settle()
        if code != 0:
            code, line = 128 + number, f"stopped by {signal.Signals(number).name}"
    if line is not None:
        print(f"{name}: {line}", file=sys.stderr)
    return code


def _hide_interrupted(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a hook that hides the traceback of a lost `Interrupted`, which is raised again later."""
    return lambda lost: None if isinstance(lost.exc_value, Interrupted) else hook(lost)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means a lack of memory; on a CPU, torch raises a plain `RuntimeError`."""
    texts = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def _is_unwinding(error: BaseException | None) -> bool:
    """Return whether an exception or one of its contexts comes from a signal."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def use_own_cores() -> None:
    """Let torch use this process's share of the available cores if a launcher has limited it to one thread.

    `accelerate launch` and torchrun start every process with one thread, even a single process on a large machine. To
    use fewer threads, set OMP_NUM_THREADS to 2 or more, or start the process without a launcher.
    """
    import torch  # takes seconds

    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(own_cores())


def own_cores() -> int:
    """Return this process's share of the available cores, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def exclusive(folder: Path, option: str = "output_dir") -> Iterator[None]:
    """Lock a folder; raise a `ValueError` that names `option` if another run has locked it."""
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--{option} {folder}: folder is in use by another run") from None
    with held:
        yield
