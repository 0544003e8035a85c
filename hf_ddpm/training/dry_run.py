"""Time that a run would take, measured on a few steps that are then thrown away, and operations of a network."""

import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_ddpm.config import EvaluationConfig
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.utils.launch import Interrupted

WARM_UP, MEASURED = 2, 5


class _Clock(Callback):
    """Notes when each step is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, run: Run) -> None:
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize(run.accelerator.device)
        self.times.append(time.perf_counter())


def measure_cost(run: Run, images: BatchSource) -> dict[str, str]:
    """Takes a few steps and returns lines to print, by name; the run is of no further use."""
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
    a_sample = (time.perf_counter() - start) / MEASURED / batch
    sampling = a_sample * training.num_samples * (training.num_inference_steps or run.pipeline().default_steps)

    return {
        "images": f"{len(images):,} of {' x '.join(map(str, images.shape))}",
        "training": f"{training.max_train_steps:,} steps of {run.global_batch_size} images, {seconds:.3g} s a step: "
        f"{_duration(seconds * training.max_train_steps)}",
        "samples.png": _duration(sampling / run.accelerator.num_processes),
    }


def count_flops(network: nn.Module, x: Tensor, *inputs: Tensor | int | None) -> tuple[float, float]:
    """Counts the operations of the matrix products and convolutions of a network.

    Args:
        network: The network; afterwards it has no gradients.
        x: Images, shape `(B, C, H, W)`.
        inputs: What else it takes: their times, and their classes.

    Returns:
        Those of an image forward, and forward and backward.
    """
    # Attention in one piece is not counted on every device, in its parts it is.
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
