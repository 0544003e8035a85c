"""From options to a report: each task, and all who take part in it."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_ddpm.benchmark.denoising_diffusion import DenoisingDiffusion
from hf_ddpm.benchmark.device import Rates, measure_rates
from hf_ddpm.benchmark.equality import check_equal, refusal
from hf_ddpm.benchmark.library import Library
from hf_ddpm.benchmark.memory import ON_CPU, ON_GPU, taken
from hf_ddpm.benchmark.options import BenchmarkConfig, grown, growth_values
from hf_ddpm.benchmark.ours import Ours
from hf_ddpm.benchmark.report import Row, failed, made_by, measured, summary
from hf_ddpm.benchmark.setting import Setting
from hf_ddpm.benchmark.stock import Stock
from hf_ddpm.benchmark.timing import Work, clock_of, reason, time_in_turns, unseen
from hf_ddpm.config import Config
from hf_ddpm.sampling.generate import PRECISIONS

LIBRARIES: dict[str, type[Library]] = {kind.name: kind for kind in (Ours, Stock, DenoisingDiffusion)}

# Tasks that are compared only if outputs are equal, and those whose memory is measured.
OF_THE_NETWORK = ("forward", "train_step", "training", "sampling", "sampling_1")
WITH_MEMORY = ("forward", "train_step", "sampling")

Tell = Callable[[str], object]


class Party:
    """A library that takes part, or why it does not.

    Args:
        name: The library.
        setting: What is shared.
        compiled: Whether its network is compiled where the options say so.
    """

    def __init__(self, name: str, setting: Setting, compiled: bool = True):
        self.name, self.kind, self.setting = name, LIBRARIES[name], setting
        self.compiled = compiled
        if not compiled:
            self.name, self.setting = f"{name}, not compiled", setting.not_compiled
        self.library: Library | None = None
        self.error: str | None = None
        self.refusal: str | None = None
        try:
            self.library = self.kind(self.setting)
            self.library.name = self.name
        except Exception as error:  # whatever an import raises
            self.error = reason(error)

    def works(self, task: str) -> list[Work] | Row | None:
        """Returns what there is to do in a task, the row that says why not, or None if the task is not for it."""
        takes_part = self.compiled or task in OF_THE_NETWORK  # the rest is the same
        if not takes_part or getattr(self.kind, task, None) is None:
            return None
        error = self.error or (self.refusal if task in OF_THE_NETWORK else None)
        if error is None:
            try:
                return getattr(self.library, task)()
            except Exception as raised:  # whatever others raise
                error = reason(raised)
        return failed(task, self.name, error)


def run_benchmark(options: BenchmarkConfig, config: Config, tell: Tell, done: Tell) -> dict[str, Any]:
    """Times all that was asked for, on the processes that there are.

    Args:
        options: What.
        config: On which network, data, batch and precision.
        tell: Told what is being done.
        done: Told what came of each task.

    Returns:
        The report.
    """
    rates, equality, rows = None, [], []
    for value in growth_values(options, config):
        with TemporaryDirectory(prefix="hf_ddpm-benchmark-") as folder, unseen():
            setting = Setting(options, grown(config, options.growth, value), Path(folder))
            if rates is None:
                tell("measuring the device")
                rates = measure_rates(setting.device, PRECISIONS[config.training.mixed_precision])
            parties = [Party(name, setting) for name in (Ours.name, *options.others)]
            if config.training.compile:  # which is an option of train.py and sample.py, not of theirs
                parties += [Party(name, setting, compiled=False) for name in options.others]
            tell("comparing outputs")
            equality += [check | {"at": value or None} for check in _check(parties, options)]
            for task in options.chosen:
                found = run_task(task, parties, setting, rates, tell)
                rows += [row | {"at": value or None} for row in found]
                done(summary(found))
    size = " x ".join(map(str, setting.shape))
    about = f"Images of {size}, {setting.batch} a process and step, precision {config.training.mixed_precision}."
    return {
        "made_by": made_by(setting.device) | {"processes": setting.processes},
        "options": asdict(options) | {"json": Path(options.json).name, "config": config.to_dict()},
        "about": about if options.growth == "none" else f"{about[:-1]}, but for the {options.growth}.",
        "memory": ON_GPU if setting.device.type == "cuda" else ON_CPU,
        "rates": rates,
        "equality": equality,
        "rows": rows,
    }


def run_task(task: str, parties: list[Party], setting: Setting, rates: Rates, tell: Tell) -> list[Row]:
    """Returns the rows of a task."""
    rows, works = [], []
    torch.compiler.reset()  # compiled networks that are gone count towards the limit of compilations
    gc.collect()  # what the task before has left would count as memory of this one
    memory = _memory(task, parties, setting, tell)
    for party in parties:
        tell(f"{task}: {party.name}")
        found = party.works(task)
        if isinstance(found, dict):
            rows.append(found)
        works += found if isinstance(found, list) else []
    clock = clock_of(setting.device)
    timed = time_in_turns(works, setting.options.rounds, clock, lambda who: tell(f"{task}: {who}"))
    pairs = list(zip(works, timed, strict=True))
    ours = next((pair for pair in pairs if pair[0].subject == Ours.name and pair[1].error is None), None)
    rates = {name: rate * setting.processes for name, rate in rates.items()}
    for work, entry in pairs:
        work.close()
        rows.append(measured(task, work, entry, ours, rates))
        if rows[-1]["error"] is None:
            rows[-1] |= memory.get(work.subject, {})
    return rows


def _check(parties: list[Party], options: BenchmarkConfig) -> list[dict[str, Any]]:
    """Returns how far those with our weights are from us, and lets them take part only if that is close enough."""
    checks = []
    ours, *others = parties
    for party in others:
        if party.kind is Stock and ours.library and party.library and set(options.chosen) & set(OF_THE_NETWORK):
            try:
                outputs = check_equal(ours.library, party.library)
            except Exception as error:  # whatever others raise
                party.refusal = f"not compared: {reason(error)}"
            else:
                party.refusal = refusal(outputs)
                checks.append({"subject": party.name, "outputs": outputs})
    return checks


def _memory(task: str, parties: list[Party], setting: Setting, tell: Tell) -> dict[str, dict[str, Any]]:
    """Returns entries of rows by subject."""
    entries: dict[str, dict[str, Any]] = {}
    if not setting.options.memory or task not in WITH_MEMORY or setting.processes > 1:
        return entries
    for party in parties:
        tell(f"{task}: memory of {party.name}")
        if party.error is None and party.refusal is None:
            try:
                used = taken(party.kind, task, setting.options, party.setting.config, setting.device)
                entries[party.name] = {"memory_bytes": used}
            except Exception as error:
                entries[party.name] = {"memory_error": reason(error)}
    return entries
