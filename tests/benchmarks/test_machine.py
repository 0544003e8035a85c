import gzip
import json
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import machine, profiling
from benchmarks import report as report_module
from benchmarks.measure import Workload
from benchmarks.profiling import profiled, trace_of
from tests.benchmarks.conftest import rows_by

CPU = torch.device("cpu")
Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")
Own = namedtuple("Own", "user system children_user children_system iowait")


def test_load_of_other_processes_excludes_this_launch(monkeypatch):
    now = SimpleNamespace(seconds=0.0, cores=[Times(*[0] * 10)] * 3, own=[Own(0, 0, 0, 0, 0)] * 2)

    class Process:
        def __init__(self, number=0):
            self.number = number

        def children(self, recursive):
            return [Process(1)] if recursive else []

        def cpu_times(self):
            return now.own[self.number]

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(machine, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda percpu: now.cores)
    monkeypatch.setattr(machine.psutil, "Process", Process)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1})
    busy = machine.busy_others()
    # In ten seconds: 9 s of work on core 0, 5 s on core 1 (1 s of it stolen by another virtual machine); core 2 is not
    # available to this process. This process and its child used 11 s of that, 2 s of it in ended children.
    now.seconds = 10.0
    now.cores = [
        Times(5, 2, 1, 1, 0, 0.5, 0.5, 0, 3, 2),
        Times(4, 0, 0, 3, 2, 0, 0, 1, 0, 0),
        Times(10, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    ]
    now.own = [Own(4, 1, 1.5, 0.5, 9), Own(3, 1, 0, 0, 9)]
    assert busy() == pytest.approx((9 + 5 - 11) / 10)


def test_report_notes_if_machine_was_not_idle():
    def row(task, *seconds, busy=0.05):
        times = {"least": min(seconds), "most": max(seconds)}
        return {"task": task, "subject": "hf_ddpm", "error": None, "seconds": times, "busy_others": busy}

    failed = {"task": "data", "subject": "hf_ddpm", "error": "no"}
    idle = {"made_by": {"load": 1.5}, "rows": [row("forward", 1, 1.09), failed]}  # a load from before the benchmark
    assert list(report_module._disturbances(idle)) == []
    busy = {"rows": [row("forward", 1, 1.09, busy=0.3), row("sampling", 2, 2.5, busy=0.2), failed]}
    assert list(report_module._disturbances(busy)) == [
        "- The machine was not idle: other processes kept 0.3 of its cores busy during forward.",
        "- The machine was not idle: rounds of hf_ddpm, sampling, differ by 25%.",
    ]


def test_report_names_hardware(benchmark, monkeypatch):
    cpu = machine.describe(CPU)["cpu"]
    info = Path("/proc/cpuinfo").read_text()
    assert cpu["name"] in info and all(f" {flag}" in info for flag in cpu["flags"]) and cpu["cores"] >= 1
    report, printed = benchmark("--tasks", "forward", "--against", "none")
    assert report["made_by"]["cpu"] == cpu and f"CPU {cpu['name']}" in printed
    (row,) = report["rows"]
    assert row["busy_others"] >= 0 and row["first_run_seconds"] > 0


def test_clocks_and_driver_of_gpu(monkeypatch):
    def run(words, **more):
        assert words[:2] == ["nvidia-smi", "--id=GPU-1234"] and "clocks.sm,clocks.mem" in words[2]
        return SimpleNamespace(stdout="580.95, 1755 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(machine.subprocess, "run", run)
    gpu = machine.describe(torch.device("cuda"))["gpu"]
    assert gpu["driver_version"] == "580.95" and gpu["clocks.sm"] == "1755 MHz" and gpu["power.limit"] == "700.00 W"

    def missing(words, **more):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine.describe(torch.device("cuda"))["gpu"] == {}
    monkeypatch.setattr(machine.subprocess, "run", lambda words, **more: subprocess.run(["false"], check=True))


def test_profile_counts_operators_per_step(tmp_path):
    a, work = torch.randn(300, 300), Workload("hf_ddpm", brief_steps=2)
    file = trace_of(str(tmp_path / "new" / "profile.json.gz"), "forward")
    with profiled(work, file, CPU):
        for _ in range(2):
            for _ in range(3):
                a.matmul(a)  # calls mm, which is not outermost and does not count
            a.relu()
    assert work.profile["per_step"] == {"operators": 4}
    longest = work.profile["longest"]
    shares = [operator["share"] for operator in longest]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6
    assert {operator["name"]: operator["calls"] for operator in longest}["aten::mm"] == 6
    assert work.profile["trace"] == "profile_forward.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert names.count("aten::mm") == 6


def test_profile_of_gpu_counts_launches_and_kernels():
    def event(name, device=DeviceType.CPU, time=0, note=False):
        return SimpleNamespace(
            name=name, key=name, device_type=device, is_user_annotation=note, self_device_time_total=time, count=1
        )

    gpu = DeviceType.CUDA
    events = [
        *[event("aten::mm"), event("cudaLaunchKernel"), event("cuLaunchKernelEx"), event("cudaGraphLaunch")],
        *[event("gemm", gpu, 30), event("norm", gpu, 60), event("in a graph", gpu, 10), event("also", gpu, 0)],
        *[event("Memcpy DtoD", gpu, 100), event("Memset", gpu), event("Optimizer.step", gpu, 1000, note=True)],
    ]
    assert profiling._per_step(events, True, 2) == {"launches": 1.5, "kernels": 2}
    longest = profiling._longest(events, True)
    assert [(row["name"], row["share"]) for row in longest[:3]] == [("Memcpy DtoD", 0.5), ("norm", 0.3), ("gemm", 0.15)]


def test_each_of_our_tasks_is_profiled(benchmark, tmp_path):
    words = ("--tasks", "forward,sampling,train_step", "--against", "diffusers", "--check", "false")
    report, printed = benchmark(*words, "--profile", str(tmp_path / "trace.json"), "--steps_per_turn", "2")
    tasks = ("forward", "sampling", "sampling_1", "train_step")
    for (_, subject), row in rows_by(report).items():
        assert row["error"] is None and (row["profile"] is None) == (subject == "diffusers")
        assert len(row["seconds"]["rounds"]) == 1
    counts = {task: rows_by(report)[task, "hf_ddpm"]["profile"]["per_step"]["operators"] for task in tasks}
    # A chain of two steps: two passes and few more operators. A training step: forward, backward, optimizer.
    assert counts["forward"] < counts["sampling"] < 2 * counts["forward"] < counts["train_step"]
    for task in tasks:
        events = json.loads((tmp_path / f"trace_{task}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("aten::conv2d") == (2 if "sampling" in task else 1) * 25
        assert task != "train_step" or "aten::isfinite" not in names  # only called at the end of a run
        assert f"## hf_ddpm, {task}: {counts[task]:,.4g} operators per step; trace in trace_{task}.json" in printed
