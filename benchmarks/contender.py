"""Base class of contenders, with a method for each task."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.measure import Workload, hidden_output, peak_memory, reason
from benchmarks.options import STEPS, BenchmarkConfig
from benchmarks.setting import SEED, Setting, new_accelerator
from hf_ddpm.config import Config
from hf_ddpm.data.streaming.stream import MOST_WORKERS
from hf_ddpm.models.precision import autocast
from hf_ddpm.sampling.generate import compile_for_sampling
from hf_ddpm.training.dry_run import count_flops

# Tasks that are compared only if the outputs are equal.
NETWORK_TASKS = ("forward", "train_step", "training", "sampling", "sampling_1")

# Number of profiled steps of a reverse process.
PROFILED_STEPS = 5


class Contender:
    """A library to compare. The method with a task's name returns the workloads of the task.

    Args:
        setting: Settings that all contenders share.
        compiled: True if the network may be compiled, with the option `compile`.

    Attributes:
        name: Name of the contender.
        statement: Python statement that imports its pipeline.
        network_class: Its network class, which accepts our options and weights.
        pipeline_class: Its pipeline class, which loads our files.
        exclusion: Reason if its networks are not compared; None otherwise.
        spent: Seconds spent on first passes (mainly compiling) before timing, keyed by whether they are training.
    """

    name: str
    statement: str
    network_class: type[nn.Module]
    pipeline_class: Any
    exclusion: str | None = None

    def __init__(self, setting: Setting, compiled: bool = True):
        self.setting, self.is_second, self.spent = setting, not compiled, dict[bool, float]()
        self.compiled = bool(compiled and setting.config.training.compile)
        if self.is_second:
            self.name += ", not compiled"

    def workloads(self, task: str) -> list[Workload]:
        """Return the workloads of a task: one with an error if the task fails, none if it does not apply."""
        is_network_task = task in NETWORK_TASKS
        is_repeated = self.is_second and not is_network_task
        if getattr(self, task, None) is None or is_repeated:
            return []
        if is_network_task and self.exclusion:
            return [Workload(self.name, error=self.exclusion)]
        try:
            return getattr(self, task)()
        except Exception as error:  # other libraries may raise anything
            return [Workload(self.name, error=reason(error))]

    def precision(self, batch: int, training: bool = False) -> str:
        """Return the precision of the network: `no`, `bf16` or `fp16`."""
        option = self.setting.options.others_precision
        return self.setting.precision(batch, training) if option == "same" else option

    def passes(self, batch: int) -> AbstractContextManager[Any]:
        """Return the context for forward passes without gradients, in the precision of this contender."""
        return autocast(self.setting.device, self.precision(batch))

    def memory(self, task: str) -> dict[str, Any]:
        """Return the row entries for the peak memory of a short run of a task, not compiled.

        On a CPU the task runs in a new process, to separate its memory from memory used before.
        """
        if self.compiled:  # it would have to be compiled again
            return {}
        options = replace(self.setting.options, rounds=1, steps_per_turn=1, others_precision="same", profile=None)
        changes = {"mixed_precision": self.precision(self.setting.batch, task in STEPS), "compile": False}
        training = replace(self.setting.config.training, num_inference_steps=2, **changes)
        arguments = type(self), task, options, replace(self.setting.config, training=training)
        try:
            _ = self.parameters  # raises an error if the library is not installed
            if self.setting.device.type == "cuda":
                return {"memory_bytes": _peak_of_task(*arguments)}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return {"memory_bytes": pool.submit(_peak_of_task, *arguments).result()}
        except Exception as error:
            return {"memory_error": reason(error)}

    def plain_network(self) -> Any:
        """Return a new network, on the device, not compiled."""
        network = self.network_class(**self.setting.config.unet())
        network.load_state_dict(self.setting.weights)
        return network.to(self.setting.device)

    def plain_pipeline(self) -> Any:
        """Return a new pipeline, not compiled."""
        return self.pipeline_class.from_pretrained(self.setting.model).to(self.setting.device)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline of all tasks, compiled with the option `compile`."""
        pipe = self.plain_pipeline()
        pipe.set_progress_bar_config(disable=True)
        if self.compiled:
            compile_for_sampling(pipe.unet)
        return pipe

    @property
    def network(self) -> Any:
        """The network of all tasks without gradients."""
        return self.pipeline.unet

    def network_of(self, batch: int) -> Any:
        """Return the network for forward passes of this batch size."""
        return self.network

    def sampler(self, batch: int) -> Any:
        """Return the pipeline for the reverse process of this batch size."""
        return self.pipeline

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the first timestep of `t`, shape `(B,)`, in the form in which sampling passes it to the network."""
        return t[0].cpu()

    @cached_property
    def _accelerator(self) -> Accelerator:
        return new_accelerator(self.precision(self.setting.batch, training=True), self.setting.device)

    def accelerator(self) -> Accelerator:
        """Return the accelerator of all tasks with gradients, without the optimizer of an earlier task."""
        self._accelerator.free_memory()
        return self._accelerator

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Floating-point operations per image: forward, and forward and backward."""
        network = self.plain_network().eval()
        return count_flops(network, *self.setting.inputs(1))

    @cached_property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.plain_network().parameters())

    def forward(self) -> list[Workload]:
        """A forward pass of the network without gradients, with one timestep for all images, as in sampling."""
        batch = self.setting.batch
        predict = self.predictor()
        return [self.work(predict, batch, self.flops[0], unit="pass", precision=self.precision(batch))]

    def predictor(self) -> Callable[[], Tensor]:
        """Return a function that runs a forward pass of a batch in the way it is timed."""
        batch = self.setting.batch
        network = self.network_of(batch).eval()
        with self.passes(batch):  # create the inputs in the same context as a reverse process
            x, t = self.setting.inputs(batch)
            x, t = x.to(next(network.parameters()).dtype), self.timesteps(t)

        def run() -> Tensor:
            with torch.no_grad(), self.passes(batch):
                output = network(x, t)
            return getattr(output, "sample", output)

        return run

    def sampling(self) -> list[Workload]:
        """The reverse process of a batch."""
        return [self.chain(self.setting.batch)]

    def sampling_1(self) -> list[Workload]:
        """The reverse process of one image."""
        return [self.chain(1)]

    def chain(self, batch: int) -> Workload:
        """Return the whole reverse process of a batch."""
        pipe, source = self.sampler(batch), torch.Generator(self.setting.device).manual_seed(SEED)

        def run(steps: int) -> None:
            with self.passes(batch):
                pipe(batch_size=batch, generator=source, num_inference_steps=steps, output_type="np")

        return self.chain_work(run, batch)

    def chain_work(self, run: Callable[[int], object], batch: int, **more: Any) -> Workload:
        """Return the workload of a reverse process; `run` takes its number of steps."""
        steps = self.setting.steps
        few = min(steps, PROFILED_STEPS)
        more |= {"unit": "chain", "at_once": True, "precision": self.precision(batch)}
        more |= {"brief": partial(run, few), "brief_steps": few}
        return self.work(partial(run, steps), batch, self.flops[0] * steps, **more)

    def import_time(self) -> list[Workload]:
        """A new Python process that imports the pipeline."""
        return [self._python(self.statement)]

    def load_time(self) -> list[Workload]:
        """A new Python process that imports the pipeline and loads a model."""
        name = self.pipeline_class.__name__
        return [self._python(f"{self.statement}; {name}.from_pretrained({str(self.setting.model)!r})")]

    def work(self, run: Callable[[], object], images: int, flops: float | None = None, **more: Any) -> Workload:
        """Return a workload; `flops` are operations per image, None without a network."""
        if flops is not None:
            more |= {"flops": flops * images, "parameters": self.parameters}
        return Workload(self.name, run, images, **more)

    def steps(self, run: Callable[[], object], **more: Any) -> Workload:
        """Return a workload of training; `run` takes all steps of a turn."""
        more |= {"unit": "step", "count": self.setting.options.steps_per_turn, "at_once": True}
        more["precision"] = self.precision(self.setting.batch, training=True)
        return self.work(run, self.setting.global_batch, self.flops[1], **more)

    def _python(self, code: str) -> Workload:
        def run() -> None:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])

        return Workload(self.name, run, unit="start", at_once=True)


def for_worker_counts(batches: Callable[[int], Workload]) -> list[Workload]:
    """Return a workload that loads images in this process and, with several threads, one with as many processes."""
    threads = min(torch.get_num_threads(), MOST_WORKERS)
    works = [batches(0)]
    if threads > 1:
        works.append(batches(threads))
        works[1].subject += f", {threads} processes"
    return works


def endless(loader: Any) -> Iterator[Any]:
    """Yield the batches of a data loader, repeated endlessly."""
    while True:
        yield from loader


def _peak_of_task(kind: type[Contender], task: str, options: BenchmarkConfig, config: Config) -> int:
    with TemporaryDirectory() as folder, hidden_output():
        contender = kind(Setting(options, config, Path(folder)))
        _ = contender.setting.model, contender.flops, contender.parameters  # computed here, so as not to be measured
        with peak_memory(contender.setting.device) as peak:
            (work,) = getattr(contender, task)()
            for _ in range(1 if work.lead is not None else options.rounds + 1):  # `lead` takes all turns in one call
                work.run()
            work.close()
            return peak()
