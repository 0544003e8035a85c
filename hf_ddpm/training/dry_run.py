"""Measure the duration of a run on a few trial steps; count a network's floating-point operations."""

import math
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_ddpm.config import EvaluationConfig
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.utils.files import count_of
from hf_ddpm.utils.launch import Interrupted

WARM_UP, MEASURED = 2, 5


class _Clock(Callback):
    """Record the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, run: Run) -> None:
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize(run.accelerator.device)
        self.times.append(time.perf_counter())


def measure_cost(run: Run, images: BatchSource) -> dict[str, str]:
    """Take a few trial steps and return the lines to print, by name. The run must not be used afterwards."""
    training = run.config.training
    x = torch.zeros(1, *images.shape, device=run.accelerator.device)
    classes = torch.zeros(1, dtype=torch.int64, device=x.device) if run.class_names else None

    clock = _Clock()
    few = WARM_UP + MEASURED
    short = replace(training, max_train_steps=few, num_train_epochs=None, checkpointing_steps=few)
    trial = replace(run, config=replace(run.config, training=short, evaluation=EvaluationConfig()))
    train(trial, images, [clock])
    if trial.stopped_by is not None:
        raise Interrupted(trial.stopped_by)
    seconds = (clock.times[-1] - clock.times[WARM_UP - 1]) / MEASURED

    start = time.perf_counter()
    with torch.no_grad(), run.accelerator.autocast():
        batch = min(training.num_samples, training.train_batch_size)
        for _ in range(MEASURED):
            run.emas[0].model(x.expand(batch, -1, -1, -1), 0, classes).sample.sum().item()
    per_image = (time.perf_counter() - start) / MEASURED / batch
    sampling = per_image * training.num_samples * (training.num_inference_steps or run.pipeline().default_steps)
    grid = sampling / run.accelerator.num_processes
    grids = math.ceil(training.max_train_steps / training.checkpointing_steps) if training.sample_at_checkpoints else 1

    return {
        "images": f"{len(images):,} of {' x '.join(map(str, images.shape))}",
        "training": f"{count_of(training.max_train_steps, 'step')} of {count_of(run.global_batch_size, 'image')}, "
        f"{seconds:.3g} s per step: {_duration(seconds * training.max_train_steps)}",
        "samples.png": _duration(grid) if grids == 1 else f"{grids} times {_duration(grid)}: {_duration(grids * grid)}",
    }


def count_flops(network: nn.Module, x: Tensor, *inputs: Tensor | int | None) -> tuple[float, float]:
    """Count the floating-point operations of a network's matrix products and convolutions.

    Args:
        network: The network; its gradients are cleared.
        x: Images, shape `(B, C, H, W)`.
        inputs: The other arguments of the network: timesteps and classes.

    Returns:
        Operations per image of a forward pass, and of a forward and backward pass.
    """
    # Fused attention is not counted on every device; the MATH backend, which is made of matrix products, is.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network(x, *inputs)
        with FlopCounterMode(display=False) as both:
            output = network(x, *inputs)
            getattr(output, "sample", output).sum().backward()
    network.zero_grad()
    return forward.get_total_flops() / len(x), both.get_total_flops() / len(x)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} (h:m:s)"
