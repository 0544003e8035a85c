"""Profile tasks: a trace, launches per step, and the slowest kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Workload

# Number of kernels in the table of a task.
TOP = 8

# CUDA calls that launch a kernel or a graph of kernels.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


@contextmanager
def profiled(work: Workload, file: Path, device: torch.device) -> Iterator[None]:
    """Profile the block; write the trace to a file, and the summary to `work.profile`."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as record:
        yield
        if on_gpu:
            torch.cuda.synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(file))
    events = record.events() or []
    top = _longest(record.key_averages(), on_gpu)
    work.profile = {"trace": file.name, "per_step": _per_step(events, on_gpu, work.brief_steps), "longest": top}


def trace_of(file: str, task: str) -> Path:
    """Return the file of a task's trace."""
    path = Path(file)
    return path.with_name(path.name.replace(".json", f"_{task}.json", 1))


def _per_step(events: Sequence[Any], on_gpu: bool, steps: int) -> dict[str, float]:
    """Return counts per step: launches and kernels on a GPU, outermost operators on a CPU."""
    if on_gpu:
        kernels = [event for event in events if _is_on_gpu(event) and not event.name.startswith(("Memcpy", "Memset"))]
        launches = [event for event in events if event.name in LAUNCHES]
        return {"launches": len(launches) / steps, "kernels": len(kernels) / steps}
    return {"operators": sum(_is_outermost(event) for event in events) / steps}


def _is_on_gpu(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _is_outermost(event: Any) -> bool:
    if not event.name.startswith("aten::"):
        return False
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is None


def _longest(averages: Sequence[Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Return the slowest kernels, or operators on a CPU; `share` is the fraction of the total time."""
    if on_gpu:
        averages = [entry for entry in averages if _is_on_gpu(entry)]
    times = [entry.self_device_time_total if on_gpu else entry.self_cpu_time_total for entry in averages]
    whole = sum(times) or 1
    rows = [
        {"name": entry.key, "calls": entry.count, "seconds": time / 1e6, "share": time / whole}
        for entry, time in zip(averages, times, strict=True)
    ]
    return sorted(rows, key=lambda row: row["seconds"], reverse=True)[:TOP]
