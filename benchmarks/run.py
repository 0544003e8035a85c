"""Run all tasks with all contenders, in one process or in one launch per number of processes."""

import gc
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contender import NETWORK_TASKS, Contender
from benchmarks.denoising_diffusion import DenoisingDiffusion
from benchmarks.equality import compare
from benchmarks.machine import busy_others, describe
from benchmarks.measure import Rates, Workload, clock_of, hidden_output, measure_rates, time_in_turns
from benchmarks.options import STEPS, BenchmarkConfig, grown, growth_values
from benchmarks.ours import Ours
from benchmarks.profiling import profiled, trace_of
from benchmarks.report import Row, made_by, summary, to_row
from benchmarks.setting import Setting
from benchmarks.stock import Stock
from hf_ddpm.config import Config
from hf_ddpm.models.precision import PRECISIONS

CONTENDERS: dict[str, type[Contender]] = {kind.name: kind for kind in (Ours, Stock, DenoisingDiffusion)}

# Tasks whose memory is measured.
MEMORY_TASKS = ("forward", "train_step", "sampling")

ON_GPU = "peak memory allocated by torch (torch.cuda.max_memory_allocated)"
ON_CPU = "peak memory of a separate process for this task, above its initial memory (Linux: VmHWM)"

# Script that is launched once per number of processes.
PROGRAM = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def run_benchmark(options: BenchmarkConfig, config: Config, bar: tqdm) -> dict[str, Any]:
    """Time all tasks on the processes of this launch, and return the report."""
    rates: dict[str, Rates] = {}
    equality, rows, machine, load = [], [], {}, round(os.getloadavg()[0], 2)
    for value in growth_values(options, config):
        with TemporaryDirectory(prefix="hf_ddpm-benchmark-") as folder, hidden_output():
            setting = Setting(options, grown(config, options.growth, value), Path(folder))
            if config.training.compile:
                torch.compiler.reset()  # otherwise earlier compiled networks count towards the recompilation limit
            contenders = [CONTENDERS[name](setting) for name in (Ours.name, *options.others)]
            if config.training.compile:  # also without compiling, as in the scripts of the others
                contenders += [CONTENDERS[name](setting, compiled=False) for name in options.others]
            at = {"at": value or None}
            if options.check and set(options.chosen) & set(NETWORK_TASKS):
                bar.set_postfix_str("comparing outputs")
                equality += [check | at for check in compare(contenders, options.chosen)]
            for task in options.chosen:
                new = run_task(task, contenders, rates, bar)
                machine = machine or describe(setting.device)  # after a task, for the clocks of a GPU under load
                rows += [row | at for row in new]
                _finish(new, bar)
    size = " x ".join(map(str, setting.shape))
    varied = "" if options.growth == "none" else f", except for the varied {options.growth}"
    return {
        "made_by": made_by(setting.device) | machine | {"processes": setting.processes, "load": load},
        "options": asdict(options) | {"json": Path(options.json).name, "config": config.to_dict()},
        "about": f"Images of {size}, {setting.batch} per process and step{varied}.",
        "precision_choices": list(dict.fromkeys(choice.line for choice in setting.choices.values())),
        "memory": ON_GPU if setting.device.type == "cuda" else ON_CPU,
        "rates": rates,
        "equality": equality,
        "rows": rows,
    }


def run_task(task: str, contenders: list[Contender], rates: dict[str, Rates], bar: tqdm) -> list[Row]:
    """Time a task, and return its rows.

    Args:
        task: The task.
        contenders: The contenders; the first is this package.
        rates: Rates of the device by precision; missing rates are measured and added.
        bar: Progress bar that shows the current turn.
    """
    setting = contenders[0].setting
    gc.collect()  # otherwise objects of the previous task count as memory of this one
    memory, works, clock = {}, [], clock_of(setting.device)
    if setting.options.memory and task in MEMORY_TASKS and setting.processes == 1:
        for contender in contenders:
            if not contender.exclusion:
                bar.set_postfix_str(f"{task}: memory of {contender.name}")
                memory[contender.name] = contender.memory(task)
    for contender in contenders:
        bar.set_postfix_str(f"{task}: {contender.name}")
        start = clock()
        made = contender.workloads(task)
        seconds = clock() - start
        if task in NETWORK_TASKS:
            seconds += contender.spent.pop(task in STEPS, 0.0)
        for work in made:
            work.first = seconds
        works += made

    def profile_of(work: Workload) -> AbstractContextManager[None] | None:
        if setting.options.profile is None or work.subject != Ours.name or not setting.is_main_process:
            return None
        return profiled(work, trace_of(setting.options.profile, task), setting.device)

    others = busy_others()
    log = lambda turn: bar.set_postfix_str(f"{task}: {turn}")  # noqa: E731
    time_in_turns(works, setting.options.rounds, clock, log, profile_of)
    busy = others()
    ours = next((work for work in works if work.subject == Ours.name and work.error is None), None)
    rows = []
    for work in works:
        work.close()
        if work.precision is not None and work.precision not in rates:
            rates[work.precision] = measure_rates(setting.device, PRECISIONS[work.precision])
        alone = rates.get(work.precision or "", {})
        row = to_row(task, work, ours, {name: rate * setting.processes for name, rate in alone.items()})
        rows.append(row if work.error else row | {"busy_others": busy} | memory.get(work.subject, {}))
    return rows


def run_processes(argv: list[str], options: BenchmarkConfig, counts: list[int], bar: tqdm) -> dict[str, Any]:
    """Launch the benchmark once per number of processes.

    Returns:
        The report of the first successful launch, with the rows of all launches.

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
                launched = json.loads(file.read_text())
                report = report or launched
                new = launched["rows"]
            else:
                lines = launch.stderr.splitlines() or ["no error message"]
                error = next((line for line in lines if "error" in line.lower()), lines[0])[:300]
                new = [{"task": task, "subject": Ours.name, "error": error} for task in options.chosen]
        rows += [row | {"at": count} for row in new]
        for task in options.chosen:
            _finish([row for row in new if row["task"] == task], bar)
    if report is None:
        raise OSError(f"all launches failed: {error}")
    return report | {"options": report["options"] | asdict(options), "rows": rows}


def _finish(task: list[Row], bar: tqdm) -> None:
    """Print a task's rows at once, in case the benchmark is interrupted later."""
    if not bar.disable:
        bar.write(summary(task), file=bar.fp)
    bar.update()
