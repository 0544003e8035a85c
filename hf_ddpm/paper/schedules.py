r"""Comparison of noise schedules for one network: signal, loss and bits per timestep.

The prediction of a network for $x_t$ depends on the amount of noise in it, not on the index `t`. A network trained with
one schedule can therefore be used with another: its time input is the (fractional) timestep at which its own schedule
has the same signal-to-noise ratio.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ddpm.paper.context import FigureContext, captioned, table
from hf_ddpm.paper.options import SchedulesOptions
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

LOSS, SIGNAL = "squared error of the noise (clipped estimates)", "alpha-bar_t, signal in the variance of x_t"


class Retimed(nn.Module):
    """A network used with a different process than the one it was trained for.

    Args:
        unet: The network.
        times: Time input of the network at each timestep of the process, shape `(T,)`.
    """

    def __init__(self, unet: nn.Module, times: Tensor):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.register_buffer("times", times)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        """Return the output of the network."""
        return self.unet(sample, self.times[timestep], class_labels)


def schedules(context: FigureContext, options: SchedulesOptions) -> None:
    """Evaluate the bound of one network with each schedule; plot bits, loss and signal per timestep."""
    reference = context.reference("nll", options.num_images)
    own = context.pipe.scheduler
    if not isinstance(own, DDPMScheduler):
        raise ValueError(f"--model: its scheduler is a {type(own).__name__}; expected a DDPMScheduler")
    curves, made_by = {}, {}
    for name in options.schedules:
        pipe = with_schedule(context.pipe, name)
        bound = reference.bound(pipe, context.options.seed)
        made_by = bound.pop("made_by")
        bars = pipe.scheduler.diffusion.alphas_cumprod
        # Convert the error of the image to the error of the noise by Eq. 4: except for clipping, the terms of Eq. 14.
        errors = (torch.tensor(bound["distortion"], dtype=torch.float64) / 127.5) ** 2
        losses = errors * bars / (1 - bars)
        curves[name] = {**bound, "mean_loss": losses.mean().item(), "losses": losses.tolist(), "signal": bars.tolist()}

    steps = list(range(1, len(own) + 1))
    for kind, label in (("terms_bpd", "bits per dimension"), ("losses", LOSS), ("signal", SIGNAL)):
        plotted = {name: (steps, curve[kind]) for name, curve in curves.items()}
        file = f"schedules_{kind.removesuffix('_bpd')}.png"
        context.plot(file, plotted, x_label="t", y_label=label, log_y=kind != "signal")
    own_name = own.config.beta_schedule if own.config.trained_betas is None else "a custom schedule"
    parts = ("total_bpd", "prior_bpd", "vlb_bpd", "decoder_bpd", "mean_loss")
    head = ["schedule", "bits per dimension", "L_T", "L_1 to L_T-1", "L_0", "mean squared error of the noise"]
    count = next(iter(curves.values()))["num_images"]
    paragraphs = [
        table(head, [[name, *(curve[part] for part in parts)] for name, curve in curves.items()]),
        f"One network, trained with {own_name}, evaluated on {count} images of {made_by['dataset']['name']}. With "
        "another schedule, its time input is the timestep at which its own schedule has the same amount of noise, or "
        "the closest one. The squared error of the noise (Eq. 14) is computed from the estimate of the image, which is "
        "clipped as in the bound.",
        captioned(
            "schedules_terms.png",
            "Bits per timestep",
            "Terms of the bound, L_0 to L_{T-1}, per timestep. Single outliers far below all other terms are cut off.",
        ),
        captioned(
            "schedules_losses.png",
            "Loss per timestep",
            "Squared error of the noise per timestep. Near T, where x_t contains almost no signal, clipping keeps the "
            "error close to zero. Single outliers are cut off.",
        ),
        captioned(
            "schedules_signal.png",
            "Signal per timestep",
            "The signal alpha-bar_t in the variance of x_t per timestep, which defines a schedule.",
        ),
    ]
    title = "Schedules (loss and bits per timestep)"
    context.write("schedules", title, paragraphs, {"schedules": curves}, options, made_by)


def with_schedule(pipe: DDPMPipeline, name: str) -> DDPMPipeline:
    """Return a pipeline of the same network with another schedule."""
    own = pipe.scheduler
    process = DDPMScheduler.from_config(own.config, beta_schedule=name, trained_betas=None)
    bars = [scheduler.diffusion.alphas_cumprod.numpy() for scheduler in (process, own)]
    target, source = (np.log(bar / (1 - bar)) for bar in bars)
    # Both fall with t, but np.interp requires rising values.
    times = np.interp(-target, -source, np.arange(len(source)))
    unet = Retimed(pipe.unet, torch.tensor(times, dtype=torch.float32, device=pipe.device))
    return DDPMPipeline(unet, process, pipe.config.get("id2label"))
