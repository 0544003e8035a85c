"""Samplers of a model: the scheduler for a name and a number of steps."""

import inspect
import math
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from hf_ddpm.diffusion.gaussian import LEARNED, start_signal
from hf_ddpm.diffusion.schedules import check_one_of
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.schedulers.stock import check_stock
from hf_ddpm.utils.options import require_value

# Other samplers of the same model; None is the pipeline's own scheduler.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]] | None] = {
    "ddpm": None,
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}
# In this order: which spacing of the steps to take for other samplers.
SPACINGS = ("trailing", "leading")
# What clips the estimate of x_0 to [-1, 1] in samplers that have no `clip_sample`.
CLIPPING = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}

# Of samplers: raised when the same settings make other images.
VERSION = 2


def find_scheduler(pipe: DiffusionPipeline, name: str, num_inference_steps: int, variance: str | None = None) -> Any:
    """Returns a sampler of a pipeline's model, in a setting in which its samples are right.

    Args:
        pipe: The pipeline.
        name: One of `SCHEDULERS`.
        num_inference_steps: Number of steps that it will take, in [1, T].
        variance: Of the steps of `ddpm`: a variance type, or `model` for that of the model. By default `fixed_large` is
            replaced by `fixed_small` in fewer than T steps, where the large one leaves grain in the images.

    Returns:
        The scheduler; for `ddpm` the pipeline's own, unless the variance is another one.

    Raises:
        ValueError: If the sampler has no such setting.
    """
    check_one_of("scheduler", name, tuple(SCHEDULERS))
    sampler, config = SCHEDULERS[name], pipe.scheduler.config
    least, most = 4 if name == "pndm" else 1, config.num_train_timesteps  # PNDM starts with Runge-Kutta
    allowed = f"{least} to {most} with this model and scheduler={name}"
    require_value("num_inference_steps", num_inference_steps, least <= num_inference_steps <= most, allowed)
    if sampler is None:
        replaced = replaced_variance(pipe, Sampling(0, num_inference_steps, name, variance=variance))  # type: ignore[arg-type]
        own = pipe.scheduler
        return own if replaced is None else type(own).from_config(config, variance_type=replaced)
    kind, options = sampler
    clips = config.get("clip_sample") and config.get("clip_sample_range", 1.0) == 1.0
    if clips and "thresholding" in inspect.signature(kind).parameters and not issubclass(kind, DDPMScheduler):
        options = options | CLIPPING
    reasons = []
    for spacing in SPACINGS:
        scheduler = kind.from_config(config, timestep_spacing=spacing, **options)
        try:
            scheduler.set_timesteps(num_inference_steps)
            check_stock(scheduler, num_inference_steps, from_noise=True, pixels=math.prod(pipe.image_shape[1:]))
            return scheduler
        except ValueError as error:
            reasons.append(str(error).partition("; ")[0])
    raise ValueError(
        f"scheduler={name}, num_inference_steps={num_inference_steps}: {reasons[0]}; use ddim, dpmsolver++, "
        "sde-dpmsolver++ or unipc, or another number of steps"
    )


def replaced_variance(pipe: Any, sampling: Sampling) -> str | None:
    """Returns the variance type that replaces the one of a pipeline's own scheduler; None to keep it.

    Raises:
        ValueError: If a variance is chosen, but the scheduler has none, or the network has learned its own.
    """
    scheduler = pipe.scheduler
    is_ddpm = isinstance(scheduler, DDPMScheduler | diffusers.DDPMScheduler) and not isinstance(
        scheduler, DDIMScheduler
    )
    own = scheduler.config.variance_type if is_ddpm else "fixed_small"
    replaced = sampling.replaced_variance(own, scheduler.config.num_train_timesteps)
    if sampling.variance not in (None, "model"):
        kind = type(scheduler).__name__
        require_value("variance", sampling.variance, is_ddpm, f"the scheduler of the model is a {kind}; expected model")
        is_learned = replaced is not None and own in LEARNED
        require_value("variance", sampling.variance, not is_learned, "the network has learned its own; expected model")
    return replaced if is_ddpm else None


def is_changed(pipe: Any, sampling: Sampling) -> bool:
    """Returns whether earlier versions sampled other images with these options: a folder must not mix both."""
    if sampling.mixed_precision in ("bf16", "fp16"):
        return True
    if sampling.scheduler != "ddpm" or pipe.scheduler.config.prediction_type == "mean":
        return True
    own = DDPMScheduler.from_config(pipe.scheduler.config)
    own.start_signal = start_signal(math.prod(pipe.image_shape[1:]))
    own.set_timesteps(sampling.steps(pipe))
    return own.timestep_spacing != own.config.timestep_spacing
