"""Settings in which schedulers of diffusers walk another process than the network was trained for."""

from typing import Any

import diffusers
import torch

from hf_ddpm.diffusion.gaussian import is_noise, start_signal

# Schedulers of diffusers that sample from the distribution of a network of this kind: see docs/samplers.md.
RIGHT = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    "SASolverScheduler",
)
# Those that cannot step with a network that predicts the image.
NO_SAMPLE = (
    *("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    "DPMSolverSDEScheduler",
)
# With fewer steps these are far off.
LEAST = {"HeunDiscreteScheduler": 10, "KDPM2AncestralDiscreteScheduler": 20, "SASolverScheduler": 20}

# Those in which `clip_sample` keeps the estimate of the image in its range, whatever is predicted.
CLIP_SAMPLE = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.DDPMScheduler)

# How much larger the signal may become in the first step where estimates of the image are not clipped: the error of the
# noise that is predicted first grows with it.
LARGEST_GAIN = 30

# Their steps lead from t to t - T // S, whatever the spacing says.
EVEN = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.PNDMScheduler)


def check_stock(scheduler: Any, num_inference_steps: int | None, *, from_noise: bool, pixels: int = 1024) -> None:
    """Raises a `ValueError` if a scheduler of diffusers would sample from another distribution than the network's.

    Schedulers of other libraries pass: nothing is known of them.

    Args:
        scheduler: The scheduler, its timesteps set.
        num_inference_steps: The number of steps that was asked for; None for timesteps given one by one.
        from_noise: Whether sampling starts from noise, not from latents.
        pixels: Number of pixels of an image, per channel.

    Raises:
        ValueError: If the process is another one, the steps do not start from noise, or do not fit together.
    """
    if not type(scheduler).__module__.startswith("diffusers."):
        return
    name, total = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
    if name not in RIGHT:
        raise ValueError(f"scheduler {name}: it is not made for such networks; use one of {', '.join(RIGHT)}")
    if name == "DDPMScheduler" and scheduler.config.variance_type == "learned":
        raise ValueError(f"scheduler {name}: it takes a learned log-variance for a variance; use hf_ddpm.DDPMScheduler")
    predicted = scheduler.config.get("prediction_type")
    if predicted == "mean" or (predicted == "sample" and name in NO_SAMPLE):
        raise ValueError(f"scheduler {name}: it has no prediction_type={predicted!r}; use hf_ddpm.DDIMScheduler")
    least = LEAST.get(name, 1)
    if num_inference_steps is not None and num_inference_steps < least:
        raise ValueError(f"scheduler {name} with num_inference_steps={num_inference_steps}: expected at least {least}")
    alphas_cumprod = scheduler.alphas_cumprod
    steps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    setting = f"scheduler {name} with {len(steps)} timesteps from {steps[0]:g} to {steps[-1]:g}"
    remedy = f"use {name}.from_config(pipe.scheduler.config, timestep_spacing='trailing')"
    if from_noise and not is_noise(alphas_cumprod, int(steps.max()), start_signal(pixels)):
        signal = float(alphas_cumprod[int(steps.max())].sqrt())
        raise ValueError(f"{setting}: sampling starts where x_t still holds {signal:.0%} of the image; {remedy}")
    clips = scheduler.config.get("thresholding") or (
        isinstance(scheduler, CLIP_SAMPLE) and scheduler.config.clip_sample
    )
    gain = _first_gain(alphas_cumprod, steps)
    if from_noise and not clips and predicted in (None, "epsilon") and gain > LARGEST_GAIN:
        raise ValueError(
            f"{setting}: x_T holds so little of the image that the first step multiplies the network's error by "
            f"{gain:.0f}; use hf_ddpm.DDIMScheduler, which clips, or a solver with "
            "thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0"
        )
    if isinstance(scheduler, EVEN) and num_inference_steps is not None and not _is_even(scheduler, num_inference_steps):
        divisors = [n for n in range(max(1, num_inference_steps // 2), total + 1) if total % n == 0]
        raise ValueError(
            f"{setting}: each step leads to t - {total // num_inference_steps}, which is not the next timestep; use "
            f"hf_ddpm.DDIMScheduler, or 'trailing' spacing with num_inference_steps={divisors[0]}"
        )
    is_multistep = bool({"solver_order", "predictor_order"} & set(scheduler.config))
    if is_multistep and len(steps.unique()) < len(steps):
        raise ValueError(f"{setting}: one of them is taken twice; {remedy}")
    if isinstance(scheduler, diffusers.DDPMScheduler) and steps[-1] > 0 and "large" in scheduler.config.variance_type:
        raise ValueError(f"{setting}: noise of the last step stays in the images; use hf_ddpm.DDPMScheduler")


def _first_gain(alphas_cumprod: torch.Tensor, steps: torch.Tensor) -> float:
    """Returns by how much the share of the image in x_t grows in the first step."""
    distinct = steps.unique().flip(0)
    between = 1 + int(bool((distinct % 1 != 0).any()))  # every second timestep of KDPM2 lies between two steps
    if len(distinct) <= between:
        return 1.0
    return float((alphas_cumprod[int(distinct[between])] / alphas_cumprod[int(distinct[0])]).sqrt())


def _is_even(scheduler: Any, num_inference_steps: int) -> bool:
    """Returns whether all timesteps are `T // S` apart; PNDM takes some of them twice or between others."""
    total, spacing = scheduler.config.num_train_timesteps, scheduler.config.timestep_spacing
    if spacing == "trailing":
        return total % num_inference_steps == 0
    return spacing == "leading" or num_inference_steps == total
