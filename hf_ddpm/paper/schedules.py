r"""Schedules side by side: the signal, the loss and the bits of each timestep, of one network.

What a network says about :math:`x_t` depends on the noise in it, not on the name `t` of the moment. So a network that
was trained with one schedule serves another: it is shown the time at which its own has the same ratio of signal to
noise, a fraction where need be.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ddpm.paper.options import SchedulesConfig
from hf_ddpm.paper.study import Study, table
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

LOSS, SIGNAL = "squared error of the noise, of clipped estimates", "share of the image in the variance of x_t"


class Retimed(nn.Module):
    """A network for another process than its own.

    Args:
        unet: The network.
        times: What it is to be shown at each step of the process, shape `(T,)`.
    """

    def __init__(self, unet: nn.Module, times: Tensor):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.register_buffer("times", times)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        """Returns what the network says."""
        return self.unet(sample, self.times[timestep], class_labels)


def schedules(study: Study, options: SchedulesConfig) -> None:
    """Writes `schedules`, .json, .md and .png.

    Args:
        study: The model and its data.
        options: Which schedules.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
    """
    evaluator = study.evaluator("nll", options.num_images)
    own = study.pipe.scheduler
    if not isinstance(own, DDPMScheduler):
        raise ValueError(f"schedules needs a DDPMScheduler, not a {type(own).__name__}")
    curves, made_by = {}, {}
    for name in options.schedules:
        pipe = with_schedule(study.pipe, name)
        bound = evaluator.bound(pipe, study.subject.seed)
        made_by = bound.pop("made_by")
        bars = pipe.scheduler.diffusion.alphas_cumprod
        # The error of the noise that an error of the image amounts to (Eq. 4): the terms of Eq. 14, but for clipping.
        errors = (torch.tensor(bound["distortion"], dtype=torch.float64) / 127.5) ** 2
        losses = errors * bars / (1 - bars)
        curves[name] = {**bound, "mean_loss": losses.mean().item(), "losses": losses.tolist(), "signal": bars.tolist()}

    steps = list(range(1, len(own) + 1))
    for kind, label in (("terms_bpd", "bits a dimension"), ("losses", LOSS), ("signal", SIGNAL)):
        pictured = {name: (steps, found[kind]) for name, found in curves.items()}
        file = f"schedules_{kind.removesuffix('_bpd')}.png"
        study.plot(file, pictured, x_label="t", y_label=label, log_y=kind != "signal")
    own_name = own.config.beta_schedule if own.config.trained_betas is None else "a schedule of its own"
    words, title = text(curves, own_name, made_by), "Schedules (loss and bits by timestep)"
    study.write("schedules", title, words, {"schedules": curves}, asdict(options), made_by)


def text(curves: dict[str, dict[str, Any]], own: str, made_by: dict[str, Any]) -> str:
    """Returns what was found, in Markdown."""
    parts = ("total_bpd", "prior_bpd", "vlb_bpd", "decoder_bpd", "mean_loss")
    rows = [[name, *(found[part] for part in parts)] for name, found in curves.items()]
    count = next(iter(curves.values()))["num_images"]
    return "\n\n".join(
        [
            table(
                ["schedule", "bits a dimension", "L_T", "L_1 to L_T-1", "L_0", "mean squared error of the noise"], rows
            ),
            f"One network, trained with {own}, on {count} images of {made_by['dataset']['name']}; in the process of "
            "another schedule it is shown the time at which its own has as much noise, or the nearest there is. The "
            "squared error of the noise (Eq. 14) is that of the estimate of the image, clipped as for the bound.",
            "![Bits by timestep](schedules_terms.png)",
            "![Loss by timestep](schedules_losses.png)",
            "![Signal by timestep](schedules_signal.png)",
        ]
    )


def with_schedule(pipe: DDPMPipeline, name: str) -> DDPMPipeline:
    """Returns a pipeline of the same network with another schedule."""
    own = pipe.scheduler
    process = DDPMScheduler.from_config(own.config, beta_schedule=name, trained_betas=None)
    bars = [scheduler.diffusion.alphas_cumprod.numpy() for scheduler in (process, own)]
    asked, known = (np.log(bar / (1 - bar)) for bar in bars)
    # Both fall; np.interp wants them to rise.
    times = np.interp(-asked, -known, np.arange(len(known)))
    unet = Retimed(pipe.unet, torch.tensor(times, dtype=torch.float32, device=pipe.device))
    return DDPMPipeline(unet, process, pipe.config.get("id2label"))
