r"""Schedules side by side: the signal, the loss and the bits of each timestep, of one network.

The prediction of a network about $x_t$ depends on the noise in it, not on the index `t`. So a network that was
trained with one schedule serves another: its input is the time, fractional if need be, at which its own schedule has
the same signal-to-noise ratio.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ddpm.paper.context import FigureContext, captioned, table
from hf_ddpm.paper.options import SchedulesOptions
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

LOSS, SIGNAL = "squared error of the noise, of clipped estimates", "share of the image in the variance of x_t"


class Retimed(nn.Module):
    """A network for another process than its own.

    Args:
        unet: The network.
        times: Its time input at each step of the process, shape `(T,)`.
    """

    def __init__(self, unet: nn.Module, times: Tensor):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.register_buffer("times", times)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        """Return the output of the network."""
        return self.unet(sample, self.times[timestep], class_labels)


def schedules(context: FigureContext, options: SchedulesOptions) -> None:
    """Evaluate the bound of one network with each schedule; plot bits, loss and signal by timestep."""
    reference = context.reference("nll", options.num_images)
    own = context.pipe.scheduler
    if not isinstance(own, DDPMScheduler):
        raise ValueError(f"schedules needs a DDPMScheduler, not a {type(own).__name__}")
    curves, made_by = {}, {}
    for name in options.schedules:
        pipe = with_schedule(context.pipe, name)
        bound = reference.bound(pipe, context.options.seed)
        made_by = bound.pop("made_by")
        bars = pipe.scheduler.diffusion.alphas_cumprod
        # The error of the noise that an error of the image amounts to (Eq. 4): the terms of Eq. 14, but for clipping.
        errors = (torch.tensor(bound["distortion"], dtype=torch.float64) / 127.5) ** 2
        losses = errors * bars / (1 - bars)
        curves[name] = {**bound, "mean_loss": losses.mean().item(), "losses": losses.tolist(), "signal": bars.tolist()}

    steps = list(range(1, len(own) + 1))
    for kind, label in (("terms_bpd", "bits per dimension"), ("losses", LOSS), ("signal", SIGNAL)):
        plotted = {name: (steps, curve[kind]) for name, curve in curves.items()}
        file = f"schedules_{kind.removesuffix('_bpd')}.png"
        context.plot(file, plotted, x_label="t", y_label=label, log_y=kind != "signal")
    own_name = own.config.beta_schedule if own.config.trained_betas is None else "a schedule of its own"
    parts = ("total_bpd", "prior_bpd", "vlb_bpd", "decoder_bpd", "mean_loss")
    head = ["schedule", "bits per dimension", "L_T", "L_1 to L_T-1", "L_0", "mean squared error of the noise"]
    count = next(iter(curves.values()))["num_images"]
    paragraphs = [
        table(head, [[name, *(curve[part] for part in parts)] for name, curve in curves.items()]),
        f"One network, trained with {own_name}, on {count} images of {made_by['dataset']['name']}; in the process of "
        "another schedule it is shown the time at which its own has as much noise, or the nearest there is. The "
        "squared error of the noise (Eq. 14) is that of the estimate of the image, clipped as for the bound.",
        captioned(
            "schedules_terms.png",
            "Bits by timestep",
            "The terms of the bound, L_0 to L_{T-1}. The axis leaves out lone terms that are far smaller than all "
            "others.",
        ),
        captioned(
            "schedules_losses.png",
            "Loss by timestep",
            "The squared error of the noise. Near T, where x_t holds almost nothing of the image, clipping bounds it "
            "near zero; the axis leaves lone points out.",
        ),
        captioned(
            "schedules_signal.png",
            "Signal by timestep",
            "alpha-bar_t, the share of the image in the variance of x_t: what a schedule chooses.",
        ),
    ]
    title = "Schedules (loss and bits by timestep)"
    context.write("schedules", title, paragraphs, {"schedules": curves}, options, made_by)


def with_schedule(pipe: DDPMPipeline, name: str) -> DDPMPipeline:
    """Return a pipeline of the same network with another schedule."""
    own = pipe.scheduler
    process = DDPMScheduler.from_config(own.config, beta_schedule=name, trained_betas=None)
    bars = [scheduler.diffusion.alphas_cumprod.numpy() for scheduler in (process, own)]
    target, source = (np.log(bar / (1 - bar)) for bar in bars)
    # Both fall; np.interp takes rising ones.
    times = np.interp(-target, -source, np.arange(len(source)))
    unet = Retimed(pipe.unet, torch.tensor(times, dtype=torch.float32, device=pipe.device))
    return DDPMPipeline(unet, process, pipe.config.get("id2label"))
