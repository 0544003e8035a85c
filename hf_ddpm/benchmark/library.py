"""What all libraries are asked for in the same lines."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hf_ddpm.benchmark.setting import SEED, Setting
from hf_ddpm.benchmark.timing import Work
from hf_ddpm.data.streaming.stream import MOST_WORKERS
from hf_ddpm.sampling.generate import compile_for_sampling
from hf_ddpm.training.dry_run import count_flops


class Library:
    """A library, with a method for each task that it takes part in; it returns the works.

    Args:
        setting: What is shared.

    Attributes:
        name: What it is called.
        statement: How its way to sample is imported.
        network_class: Its network, of our options and weights.
        pipeline_class: Its pipeline, of our files.
    """

    name: str
    statement: str
    network_class: type[nn.Module]
    pipeline_class: Any

    def __init__(self, setting: Setting):
        self.setting = setting

    def network(self, trained: bool = False) -> Any:
        """Returns the network, compiled if the options say so: for passes without gradients, or to be trained."""
        network = self.plain_network().to(self.setting.device)
        if self.setting.config.training.compile:
            if trained:
                network.compile()
            else:
                compile_for_sampling(network)
        return network

    def plain_network(self) -> Any:
        """Returns the network, as it is made."""
        network = self.network_class(**self.setting.config.unet())
        network.load_state_dict(self.setting.weights)
        return network

    def pipeline(self) -> Any:
        """Returns the pipeline."""
        pipe = self.pipeline_class.from_pretrained(self.setting.model).to(self.setting.device)
        pipe.set_progress_bar_config(disable=True)
        if self.setting.config.training.compile:
            compile_for_sampling(pipe.unet)
        return pipe

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Operations of an image, forward, and forward and backward."""
        network = self.plain_network().to(self.setting.device).eval()
        return count_flops(network, *self.setting.inputs(1))

    @cached_property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.plain_network().parameters())

    def forward(self) -> list[Work]:
        """The network without gradients."""
        setting, network = self.setting, self.network().eval()
        inputs = setting.inputs(setting.batch)

        def run() -> None:
            with torch.no_grad(), setting.autocast():
                network(*inputs)

        return [self.work(run, setting.batch, self.flops[0], unit="pass")]

    def sampling(self) -> list[Work]:
        """The chain of a batch."""
        return [self.chain(self.setting.batch)]

    def sampling_1(self) -> list[Work]:
        """The chain of an image."""
        return [self.chain(1)]

    def chain(self, batch: int) -> Work:
        """Returns the whole reverse process for so many images."""
        setting, pipe = self.setting, self.pipeline()
        source = torch.Generator(setting.device).manual_seed(SEED)

        def run() -> None:
            with setting.autocast():
                pipe(batch_size=batch, generator=source, num_inference_steps=setting.steps, output_type="np")

        return self.work(run, batch, self.flops[0] * setting.steps, unit="chain", at_once=True)

    def import_time(self) -> list[Work]:
        """A new Python that imports what samples."""
        return [self.work(_python(self.statement), None, unit="start", at_once=True)]

    def load_time(self) -> list[Work]:
        """One that loads a model, too."""
        code = f"{self.statement}; {self.pipeline_class.__name__}.from_pretrained({str(self.setting.model)!r})"
        return [self.work(_python(code), None, unit="start", at_once=True)]

    def work(self, run: Callable[[], object], images: int | None, flops: float | None = None, **more: Any) -> Work:
        """Returns a work; `flops` are those of an image, None where there is no network in it."""
        if images is not None and flops is not None:
            more |= {"flops": flops * images, "parameters": self.parameters}
        return Work(self.name, run, images, **more)

    def steps(self, run: Callable[[], object], **more: Any) -> Work:
        """Returns the work of training that `run` does the steps of a turn of."""
        setting = self.setting
        more = {"unit": "step", "count": setting.options.steps_per_turn, "at_once": True, **more}
        return self.work(run, setting.batch * setting.processes, self.flops[1], **more)


def worker_counts() -> list[int]:
    """Returns in how many processes images are decoded: in none beside this one, and in one for each of its threads."""
    threads = min(torch.get_num_threads(), MOST_WORKERS)
    return [0, threads] if threads > 1 else [0]


def with_workers(work: Work, workers: int) -> Work:
    """Returns a work with the number of processes that it has in its name."""
    return replace(work, subject=f"{work.subject}, {workers} processes") if workers else work


def endless(loader: Any) -> Iterator[Any]:
    """Yields the batches of a loader, again and again."""
    while True:
        yield from loader


def _python(code: str) -> Callable[[], object]:
    """Returns what runs code in a new Python."""

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])

    return run
