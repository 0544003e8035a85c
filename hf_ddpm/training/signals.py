"""SIGTERM and Ctrl-C end a run between two steps, on all processes at the same one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

from hf_ddpm.launch import Interrupted


class StopSignal:
    """While entered, notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts as usual.

    Args:
        accelerator: Tells which processes must agree.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._number = 0
        self._at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Takes the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Gives them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def received(self) -> int | None:
        """Returns the number of a signal that any process has received; every process must ask."""
        number = self._number
        if self._accelerator.num_processes > 1:
            mine = torch.tensor(number, device=self._accelerator.device)
            number = int(self._accelerator.gather(mine).max())
        return number or None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a signal raise `Interrupted` while nothing is there to be saved."""
        self._at_once = True
        if self._number:
            raise Interrupted(self._number)
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or (self._number and number == signal.SIGINT):
            raise Interrupted(number)
        self._number = number
