"""Create the scheduler for a sampler's name and a number of steps."""

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

# Scheduler class and options by name of the sampler; None is the pipeline's own scheduler.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]] | None] = {
    "ddpm": None,
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "sde-dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}
# Timestep spacings of other samplers, in order of preference.
SPACINGS = ("trailing", "leading")
# Options that clip the estimate of x_0 to [-1, 1] in samplers without `clip_sample`.
CLIPPING = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}

# Version of the samplers, increased when the same settings produce different images.
VERSION = 2


def find_scheduler(pipe: DiffusionPipeline, name: str, num_inference_steps: int, variance: str | None = None) -> Any:
    """Return a scheduler for a pipeline's model, with settings that give correct samples.

    Args:
        pipe: The pipeline.
        name: Name of the sampler, a key of `SCHEDULERS`.
        num_inference_steps: Number of steps, in [1, T].
        variance: Variance of the steps of `ddpm`: a variance type, or `model` for the model's. By default `fixed_large`
            is replaced by `fixed_small` in fewer than T steps, where `fixed_large` leaves noise in the images.

    Returns:
        The scheduler; for `ddpm` the pipeline's own, unless its variance is replaced.

    Raises:
        ValueError: If no settings of the sampler give correct samples.
    """
    check_one_of("scheduler", name, tuple(SCHEDULERS))
    sampler, config = SCHEDULERS[name], pipe.scheduler.config
    least, most = 4 if name == "pndm" else 1, config.num_train_timesteps  # PNDM starts with Runge-Kutta
    allowed = f"{least} to {most} with this model and --scheduler {name}"
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
        f"--scheduler {name} --num_inference_steps {num_inference_steps}: {reasons[0]}; use ddim, dpmsolver++, "
        "sde-dpmsolver++ or unipc, or another number of steps"
    )


def replaced_variance(pipe: Any, sampling: Sampling) -> str | None:
    """Return the variance type that replaces the one of a pipeline's own scheduler; None to keep it.

    Raises:
        ValueError: If a variance is chosen, but the scheduler has no variance type, or the variance is learned.
    """
    scheduler = pipe.scheduler
    is_ddpm = isinstance(scheduler, DDPMScheduler | diffusers.DDPMScheduler) and not isinstance(
        scheduler, DDIMScheduler
    )
    own = scheduler.config.variance_type if is_ddpm else "fixed_small"
    replaced = sampling.replaced_variance(own, scheduler.config.num_train_timesteps)
    if sampling.variance not in (None, "model"):
        kind = type(scheduler).__name__
        require_value("variance", sampling.variance, is_ddpm, f"the model's scheduler is a {kind}; expected model")
        is_learned = replaced is not None and own in LEARNED
        require_value("variance", sampling.variance, not is_learned, "the network learns its variance; expected model")
    return replaced if is_ddpm else None


def is_changed(pipe: Any, sampling: Sampling) -> bool:
    """Return whether older package versions sampled other images with these options; a folder must not mix them."""
    if sampling.mixed_precision in ("bf16", "fp16"):
        return True
    if sampling.scheduler != "ddpm" or pipe.scheduler.config.prediction_type == "mean":
        return True
    own = DDPMScheduler.from_config(pipe.scheduler.config)
    own.start_signal = start_signal(math.prod(pipe.image_shape[1:]))
    own.set_timesteps(sampling.steps(pipe))
    return own.timestep_spacing != own.config.timestep_spacing
