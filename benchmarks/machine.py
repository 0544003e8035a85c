"""Describe the hardware, and measure the CPU load of other processes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

# CPU instruction sets that determine the speed in float32 and bf16.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

# Fields of nvidia-smi: driver version, current and maximum clocks in MHz, power limit in W.
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def describe(device: torch.device) -> dict[str, Any]:
    """Return the CPU and, for a GPU, its driver, clocks and power limit, if nvidia-smi is installed."""
    return {"cpu": _cpu()} | ({"gpu": _gpu(device)} if device.type == "cuda" else {})


def busy_others() -> Callable[[], float]:
    """Return a function that returns the average number of cores kept busy by other processes since this call.

    Only cores that this process may use are counted. Processes of this launch do not count as other processes.
    """
    start, before = perf_counter(), _others_seconds()
    return lambda: max(0.0, (_others_seconds() - before) / (perf_counter() - start))


def _others_seconds() -> float:
    cores = psutil.cpu_times(percpu=True)
    names = ("user", "nice", "system", "irq", "softirq", "steal")  # user includes guest
    busy = sum(getattr(cores[i], name, 0.0) for i in os.sched_getaffinity(0) if i < len(cores) for name in names)
    return busy - _own_seconds()


def _own_seconds() -> float:
    """Return the CPU time of this process and its descendants, or of all processes of the launch."""
    root = psutil.Process()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        root = root.parent() or root
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user and system time, of the process and its ended children
        except psutil.NoSuchProcess:
            continue  # it has ended in the meantime
    return total


def _cpu() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    entries = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = entries.get("flags", "").split()
    return {
        "name": entries.get("model name"),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def _gpu(device: torch.device) -> dict[str, str]:
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".replace("GPU-GPU-", "GPU-")
    words = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_FIELDS, (value.strip() for value in result.stdout.split(",")), strict=False))
