"""End a run between two steps on SIGTERM and Ctrl-C, on all processes at the same one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from accelerate import Accelerator

from hf_ddpm.utils.launch import signals


class StopSignal:
    """While entered, SIGTERM and SIGINT only set the flag of `launch.signals`; a second SIGINT interrupts as usual.

    Args:
        accelerator: The processes, which must agree.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __enter__(self) -> "StopSignal":
        """Takes the signals over."""
        self._handled = signals.handled(deferred=True)
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Gives them back."""
        self._handled.__exit__(kind, error, trace)

    def received(self) -> int | None:
        """Returns the number of a signal that any process has received; every process must ask."""
        number = signals.number
        if self._accelerator.num_processes > 1:
            mine = torch.tensor(number, device=self._accelerator.device)
            number = int(self._accelerator.gather(mine).max())
        return number or None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a signal raise `Interrupted` while nothing is there to be saved."""
        with signals.at_once():
            yield
