"""What a device can do at best, and the memory that is taken on it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_ddpm.benchmark.timing import clock_of

# Runs of which the fastest one counts.
TRIALS = 15

Rates = dict[str, float]


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Returns the operations a second of a large matrix product and of a large 3x3 convolution, each alone."""
    large = device.type == "cuda"
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    batch, channels, size = (256, 256, 32) if large else (16, 128, 32)
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    rates = {
        "matmul": 2 * side**3 / _fastest(lambda: a @ b, device),
        "convolution": 0.0,
    }
    for layout in (torch.contiguous_format, torch.channels_last):
        x, kernel = x.contiguous(memory_format=layout), kernel.contiguous(memory_format=layout)
        seconds = _fastest(lambda x=x, kernel=kernel: F.conv2d(x, kernel, padding=1), device)
        rates["convolution"] = max(rates["convolution"], 2 * 9 * channels * x.numel() / seconds)
    return rates


@contextmanager
def full_precision() -> Iterator[None]:
    """Lets no GPU round the factors of float32 products."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what tells the most memory that was taken at once since, in bytes, beyond what was taken before.

    On a GPU that is what torch's allocator has handed out, elsewhere what the process holds.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is as of now
        before = _resident("VmRSS")
        yield lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Returns an entry of what Linux says about this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    clock, seconds = clock_of(device), []
    for _ in range(TRIALS):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)
