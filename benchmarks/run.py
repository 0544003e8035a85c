"""Runs each task with all contenders, in one process or in one launch per number of processes."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contender import NETWORK_TASKS, Contender, check_equal, refusal_of
from benchmarks.denoising_diffusion import DenoisingDiffusion
from benchmarks.measure import Rates, clock_of, hidden_output, measure_rates, reason, time_in_turns
from benchmarks.options import BenchmarkConfig, grown, growth_values
from benchmarks.ours import Ours
from benchmarks.report import Row, made_by, summary, to_row
from benchmarks.setting import Setting
from benchmarks.stock import Stock
from hf_ddpm.config import Config
from hf_ddpm.models.precision import PRECISIONS

CONTENDERS: dict[str, type[Contender]] = {kind.name: kind for kind in (Ours, Stock, DenoisingDiffusion)}

# Tasks whose memory is measured.
MEMORY_TASKS = ("forward", "train_step", "sampling")

ON_GPU = "the most that torch's allocator has handed out at once (torch.cuda.max_memory_allocated)"
ON_CPU = "the most that a process for this task alone holds, beyond what it holds before (Linux: VmHWM)"

# Launched once per number of processes.
PROGRAM = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def run_benchmark(options: BenchmarkConfig, config: Config, bar: tqdm) -> dict[str, Any]:
    """Times all tasks on the processes of this launch and returns the report."""
    rates, equality, rows, load = None, [], [], round(os.getloadavg()[0], 2)
    for value in growth_values(options, config):
        with TemporaryDirectory(prefix="hf_ddpm-benchmark-") as folder, hidden_output():
            setting = Setting(options, grown(config, options.growth, value), Path(folder))
            if rates is None:
                bar.set_postfix_str("measuring the device")
                rates = measure_rates(setting.device, PRECISIONS[config.training.mixed_precision])
            contenders = [CONTENDERS[name](setting) for name in (Ours.name, *options.others)]
            if config.training.compile:  # an option of train.py and sample.py, not of the others' scripts
                contenders += [CONTENDERS[name](setting, compiled=False) for name in options.others]
            at = {"at": value or None}
            if options.check:
                bar.set_postfix_str("comparing outputs")
                equality += [check | at for check in _check(contenders, options)]
            for task in options.chosen:
                found = run_task(task, contenders, rates, bar)
                rows += [row | at for row in found]
                _finish(found, bar)
    size = " x ".join(map(str, setting.shape))
    about = f"Images of {size}, {setting.batch} a process and step, precision {config.training.mixed_precision}."
    return {
        "made_by": made_by(setting.device) | {"processes": setting.processes, "load": load},
        "options": asdict(options) | {"json": Path(options.json).name, "config": config.to_dict()},
        "about": about if options.growth == "none" else f"{about[:-1]}, but for the {options.growth}.",
        "memory": ON_GPU if setting.device.type == "cuda" else ON_CPU,
        "rates": rates,
        "equality": equality,
        "rows": rows,
    }


def run_task(task: str, contenders: list[Contender], rates: Rates, bar: tqdm) -> list[Row]:
    """Times a task and returns its rows; the first contender is this package."""
    setting = contenders[0].setting
    if setting.config.training.compile:
        torch.compiler.reset()  # compiled networks that are gone count towards the limit of compilations
    gc.collect()  # leftovers of the task before would count as memory of this one
    memory, works = {}, []
    if setting.options.memory and task in MEMORY_TASKS and setting.processes == 1:
        for contender in contenders:
            if not contender.refusal:
                bar.set_postfix_str(f"{task}: memory of {contender.name}")
                memory[contender.name] = contender.memory(task)
    for contender in contenders:
        bar.set_postfix_str(f"{task}: {contender.name}")
        works += contender.workloads(task)
    clock = clock_of(setting.device)
    time_in_turns(works, setting.options.rounds, clock, lambda turn: bar.set_postfix_str(f"{task}: {turn}"))
    ours = next((work for work in works if work.subject == Ours.name and work.error is None), None)
    rates = {name: rate * setting.processes for name, rate in rates.items()}
    rows = []
    for work in works:
        work.close()
        row = to_row(task, work, ours, rates)
        rows.append(row if work.error else row | memory.get(work.subject, {}))
    return rows


def run_processes(argv: list[str], options: BenchmarkConfig, counts: list[int], bar: tqdm) -> dict[str, Any]:
    """Launches the benchmark once per number of processes.

    Returns:
        The report of the first launch that succeeded, with the rows of all.

    Raises:
        OSError: If no launch succeeded.
    """
    report, error, rows = None, "", []
    for count in counts:
        bar.set_postfix_str(f"{count} processes")
        with TemporaryDirectory() as folder:
            file = Path(folder) / "report.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", str(PROGRAM)]
            words = [*argv, "--growth", "none", "--json", str(file)]
            launch = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True)
            if launch.returncode == 0:
                found = json.loads(file.read_text())
                report = report or found
                new = found["rows"]
            else:
                lines = launch.stderr.splitlines() or ["no error message"]
                error = next((line for line in lines if "error" in line.lower()), lines[0])[:300]
                new = [{"task": task, "subject": Ours.name, "error": error} for task in options.chosen]
        rows += [row | {"at": count} for row in new]
        for task in options.chosen:
            _finish([row for row in new if row["task"] == task], bar)
    if report is None:
        raise OSError(f"no launch succeeded: {error}")
    return report | {"options": report["options"] | asdict(options), "rows": rows}


def _check(contenders: list[Contender], options: BenchmarkConfig) -> list[dict[str, Any]]:
    """Compares the outputs of contenders that have our weights; refuses a comparison of times if they differ."""
    checks = []
    ours, *others = contenders
    for other in others:
        if isinstance(other, Stock) and set(options.chosen) & set(NETWORK_TASKS):
            try:
                outputs = check_equal(ours, other)
            except Exception as error:  # whatever others raise
                other.refusal = f"not compared: {reason(error)}"
            else:
                other.refusal = refusal_of(outputs)
                checks.append({"subject": other.name, "outputs": outputs})
    return checks


def _finish(task: list[Row], bar: tqdm) -> None:
    """Shows a task's rows, which are then known even if the benchmark is interrupted later."""
    if not bar.disable:
        bar.write(summary(task), file=bar.fp)
    bar.update()
