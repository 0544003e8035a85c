"""The base of all contenders: a library with a method for each task."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Workload, hidden_output, peak_memory, reason
from benchmarks.options import BenchmarkConfig
from benchmarks.setting import SEED, Setting
from hf_ddpm.config import Config
from hf_ddpm.data.streaming.stream import MOST_WORKERS
from hf_ddpm.sampling.generate import compile_for_sampling
from hf_ddpm.training.dry_run import count_flops

# Tasks that are compared only if outputs are equal.
NETWORK_TASKS = ("forward", "train_step", "training", "sampling", "sampling_1")

# Of outputs relative to the largest entry; of images in [0, 1], after a few steps, absolute. The tables of diffusers
# have float32 errors of about 1e-4 at the last steps.
TOLERANCES = {"network": 1e-4, "gradients": 1e-4, "images": 1e-3}
STEPS = 10


class Contender:
    """A library; a method named like a task returns the workloads of that task.

    Args:
        setting: The settings that all contenders share.
        compiled: Whether the network is compiled if the options say so.

    Attributes:
        name: Name of the contender.
        statement: Import of its pipeline.
        network_class: Its network, which takes our options and weights.
        pipeline_class: Its pipeline, which loads our files.
        refusal: Why its networks are not compared, if so.
    """

    name: str
    statement: str
    network_class: type[nn.Module]
    pipeline_class: Any
    refusal: str | None = None

    def __init__(self, setting: Setting, compiled: bool = True):
        self.setting, self.is_second = setting, not compiled
        self.compiled = compiled and setting.config.training.compile
        if self.is_second:
            self.name += ", not compiled"

    def workloads(self, task: str) -> list[Workload]:
        """Returns the workloads of a task, one with an error if it cannot be done, none if it does not apply."""
        is_network_task = task in NETWORK_TASKS
        if getattr(self, task, None) is None or (self.is_second and not is_network_task):  # else the same twice
            return []
        if is_network_task and self.refusal:
            return [Workload(self.name, error=self.refusal)]
        try:
            return getattr(self, task)()
        except Exception as error:  # whatever others raise
            return [Workload(self.name, error=reason(error))]

    def memory(self, task: str) -> dict[str, Any]:
        """Returns the entries of a row on the peak memory of a short run of a task.

        On a CPU it runs in a process of its own: memory that was used before cannot be told from that of the task.
        """
        options = replace(self.setting.options, rounds=1, steps_per_turn=1)
        training = replace(self.setting.config.training, num_inference_steps=2, compile=self.compiled)
        arguments = type(self), task, options, replace(self.setting.config, training=training)
        try:
            _ = self.parameters  # fails at once if the library is not installed
            if self.setting.device.type == "cuda":
                return {"memory_bytes": _peak_of_task(*arguments)}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return {"memory_bytes": pool.submit(_peak_of_task, *arguments).result()}
        except Exception as error:
            return {"memory_error": reason(error)}

    def network(self, trained: bool = False) -> Any:
        """Returns the network, for inference or to be trained, compiled if the options say so."""
        network = self.plain_network().to(self.setting.device)
        if self.compiled:
            if trained:
                network.compile()
            else:
                compile_for_sampling(network)
        return network

    def plain_network(self) -> Any:
        """Returns the network on the CPU, not compiled."""
        network = self.network_class(**self.setting.config.unet())
        network.load_state_dict(self.setting.weights)
        return network

    def pipeline(self) -> Any:
        """Returns the pipeline, compiled if the options say so."""
        pipe = self.pipeline_class.from_pretrained(self.setting.model).to(self.setting.device)
        pipe.set_progress_bar_config(disable=True)
        if self.compiled:
            compile_for_sampling(pipe.unet)
        return pipe

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Operations per image: forward, and forward and backward."""
        network = self.plain_network().to(self.setting.device).eval()
        return count_flops(network, *self.setting.inputs(1))

    @cached_property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.plain_network().parameters())

    def forward(self) -> list[Workload]:
        """The network without gradients."""
        setting, network = self.setting, self.network().eval()
        inputs = setting.inputs(setting.batch)

        def run() -> None:
            with torch.no_grad(), setting.autocast():
                network(*inputs)

        return [self.work(run, setting.batch, self.flops[0], unit="pass")]

    def sampling(self) -> list[Workload]:
        """The reverse process of a batch."""
        return [self.chain(self.setting.batch)]

    def sampling_1(self) -> list[Workload]:
        """The reverse process of one image."""
        return [self.chain(1)]

    def chain(self, batch: int) -> Workload:
        """Returns the whole reverse process of a batch."""
        setting, pipe = self.setting, self.pipeline()
        source = torch.Generator(setting.device).manual_seed(SEED)

        def run() -> None:
            with setting.autocast():
                pipe(batch_size=batch, generator=source, num_inference_steps=setting.steps, output_type="np")

        return self.work(run, batch, self.flops[0] * setting.steps, unit="chain", at_once=True)

    def import_time(self) -> list[Workload]:
        """A new Python that imports the pipeline."""
        return [self._python(self.statement)]

    def load_time(self) -> list[Workload]:
        """A new Python that imports the pipeline and loads a model."""
        name = self.pipeline_class.__name__
        return [self._python(f"{self.statement}; {name}.from_pretrained({str(self.setting.model)!r})")]

    def work(self, run: Callable[[], object], images: int, flops: float | None = None, **more: Any) -> Workload:
        """Returns a workload; `flops` are those of an image, None without a network."""
        if flops is not None:
            more |= {"flops": flops * images, "parameters": self.parameters}
        return Workload(self.name, run, images, **more)

    def steps(self, run: Callable[[], object], **more: Any) -> Workload:
        """Returns the workload of training; `run` does all steps of a turn."""
        more |= {"unit": "step", "count": self.setting.options.steps_per_turn, "at_once": True}
        return self.work(run, self.setting.global_batch, self.flops[1], **more)

    def _python(self, code: str) -> Workload:
        def run() -> None:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])

        return Workload(self.name, run, unit="start", at_once=True)


def for_worker_counts(batches: Callable[[int], Workload]) -> list[Workload]:
    """Returns workloads that decode images in this process, and in as many other processes as it has threads."""
    threads = min(torch.get_num_threads(), MOST_WORKERS)
    works = [batches(0)]
    if threads > 1:
        works.append(batches(threads))
        works[1].subject += f", {threads} processes"
    return works


def endless(loader: Any) -> Iterator[Any]:
    """Yields the batches of a data loader again and again."""
    while True:
        yield from loader


def check_equal(ours: Contender, theirs: Contender) -> dict[str, dict[str, Any]]:
    """Compares networks and gradients on the same input, and images of the same seed after a few steps, in float32.

    Returns:
        For `network`, `gradients` and `images`: the largest `difference`, its `tolerance` and whether they are `equal`.
    """
    checks = {}
    theirs.setting.allow_tf32(False)
    try:
        for name, outputs in {"network": _predictions, "gradients": _gradients, "images": _images}.items():
            right, found = outputs(ours), outputs(theirs)
            scale = 1.0 if name == "images" else right.abs().max().item()
            difference = (found - right).abs().max().item() / scale
            tolerance = TOLERANCES[name]
            equal = difference <= tolerance  # false for NaN
            checks[name] = {"difference": difference, "tolerance": tolerance, "equal": equal}
    finally:
        theirs.setting.allow_tf32(theirs.setting.config.training.tf32)
    return checks


def refusal_of(checks: dict[str, dict[str, Any]]) -> str | None:
    """Returns why outputs are not equal, or None."""
    for name, check in checks.items():
        if not check["equal"]:
            return f"not compared: its {name} differ by {check['difference']:.2g}, {check['tolerance']:g} is allowed"
    return None


@torch.no_grad()
def _predictions(contender: Contender) -> Tensor:
    return contender.network().eval()(*contender.setting.inputs(2)).sample.clone()  # a CUDA graph reuses its output


def _gradients(contender: Contender) -> Tensor:
    """Returns the gradients of a loss as one vector; zeros where a compiler has lost one."""
    network = contender.network(trained=True).eval()
    network(*contender.setting.inputs(2)).sample.square().mean().backward()
    zero = torch.zeros(1, device=contender.setting.device)
    by_name = sorted(network.named_parameters())
    return torch.cat([zero.expand(p.numel()) if p.grad is None else p.grad.flatten() for _, p in by_name])


def _images(contender: Contender) -> Tensor:
    setting, source = contender.setting, torch.Generator(contender.setting.device).manual_seed(SEED)
    pipe, steps = contender.pipeline(), min(STEPS, setting.steps)
    return torch.from_numpy(pipe(batch_size=2, generator=source, num_inference_steps=steps, output_type="np").images)


def _peak_of_task(kind: type[Contender], task: str, options: BenchmarkConfig, config: Config) -> int:
    with TemporaryDirectory() as folder, hidden_output():
        contender = kind(Setting(options, config, Path(folder)))
        _ = contender.setting.model, contender.flops, contender.parameters  # they take memory, but not for the task
        with peak_memory(contender.setting.device) as peak:
            (work,) = getattr(contender, task)()
            for _ in range(1 if work.lead is not None else options.rounds + 1):  # `lead` takes all turns in one
                work.run()
            work.close()
            return peak()
