"""Checks of diffusers' schedulers: reject settings that sample from a wrong distribution."""

from typing import Any

import diffusers
import torch

from hf_ddpm.diffusion.gaussian import is_noise, start_signal

# diffusers schedulers that sample correctly with the networks of this package: see docs/samplers.md.
SUPPORTED_SCHEDULERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    "SASolverScheduler",
)
# Schedulers that do not support prediction_type="sample".
NO_SAMPLE = (
    *("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    "DPMSolverSDEScheduler",
)
# Minimum number of steps: with fewer, samples are far from the network's distribution.
LEAST = {"HeunDiscreteScheduler": 10, "KDPM2AncestralDiscreteScheduler": 20, "SASolverScheduler": 20}

# Schedulers in which `clip_sample` clips the estimate of the image for every prediction type.
CLIP_SAMPLE = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.DDPMScheduler)

# Largest growth of the signal in the first step if estimates of the image are not clipped: the error of the first noise
# prediction is multiplied by it.
LARGEST_GAIN = 30

# Schedulers whose steps lead from t to t - T // S for every spacing.
EVEN = (diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler, diffusers.PNDMScheduler)


def check_stock(scheduler: Any, num_inference_steps: int | None, *, from_noise: bool, pixels: int = 1024) -> None:
    """Raise a `ValueError` if a diffusers scheduler would not sample from the network's distribution.

    Schedulers of other libraries are not checked.

    Args:
        scheduler: The scheduler, after `set_timesteps`.
        num_inference_steps: The number of steps passed to `set_timesteps`; None if explicit timesteps were passed.
        from_noise: True if sampling starts from noise, False if it starts from given latents.
        pixels: Number of pixels of an image, per channel.

    Raises:
        ValueError: If the scheduler does not support the network, its first timestep is not noise, or its steps do not
            lead from one timestep to the next.
    """
    if not type(scheduler).__module__.startswith("diffusers."):
        return
    name, total = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
    if name not in SUPPORTED_SCHEDULERS:
        supported = ", ".join(SUPPORTED_SCHEDULERS)
        raise ValueError(f"scheduler {name}: not made for DDPM networks; expected one of {supported}")
    if name == "DDPMScheduler" and scheduler.config.variance_type == "learned":
        raise ValueError(
            f"scheduler {name}: treats the learned log-variance as a variance; use hf_ddpm.DDPMScheduler instead"
        )
    predicted = scheduler.config.get("prediction_type")
    if predicted == "mean" or (predicted == "sample" and name in NO_SAMPLE):
        raise ValueError(
            f"scheduler {name}: does not support prediction_type={predicted!r}; use hf_ddpm.DDIMScheduler instead"
        )
    least = LEAST.get(name, 1)
    if num_inference_steps is not None and num_inference_steps < least:
        raise ValueError(f"scheduler {name} with num_inference_steps={num_inference_steps}: expected at least {least}")
    alphas_cumprod = scheduler.alphas_cumprod
    steps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    setting = f"scheduler {name} with {len(steps)} timesteps from {steps[0]:g} to {steps[-1]:g}"
    remedy = f"use {name}.from_config(pipe.scheduler.config, timestep_spacing='trailing')"
    if from_noise and not is_noise(alphas_cumprod, int(steps.max()), start_signal(pixels)):
        signal = float(alphas_cumprod[int(steps.max())].sqrt())
        raise ValueError(f"{setting}: the first x_t is not noise but contains {signal:.0%} of the image; {remedy}")
    clips = scheduler.config.get("thresholding") or (
        isinstance(scheduler, CLIP_SAMPLE) and scheduler.config.clip_sample
    )
    gain = _first_gain(alphas_cumprod, steps)
    if from_noise and not clips and predicted in (None, "epsilon") and gain > LARGEST_GAIN:
        raise ValueError(
            f"{setting}: x_T contains so little signal that the first step multiplies the network's error by "
            f"{gain:.0f}; use hf_ddpm.DDIMScheduler, which clips, or a solver with "
            "thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0"
        )
    if isinstance(scheduler, EVEN) and num_inference_steps is not None and not _is_even(scheduler, num_inference_steps):
        divisors = [n for n in range(max(1, num_inference_steps // 2), total + 1) if total % n == 0]
        raise ValueError(
            f"{setting}: each step leads to t - {total // num_inference_steps}, which is not the next timestep; use "
            f"hf_ddpm.DDIMScheduler, or timestep_spacing='trailing' with num_inference_steps={divisors[0]}"
        )
    is_multistep = bool({"solver_order", "predictor_order"} & set(scheduler.config))
    if is_multistep and len(steps.unique()) < len(steps):
        raise ValueError(f"{setting}: a timestep is repeated; {remedy}")
    if isinstance(scheduler, diffusers.DDPMScheduler) and steps[-1] > 0 and "large" in scheduler.config.variance_type:
        raise ValueError(f"{setting}: the noise of the last step stays in the images; use hf_ddpm.DDPMScheduler")


def _first_gain(alphas_cumprod: torch.Tensor, steps: torch.Tensor) -> float:
    """Return the factor by which the image's coefficient in x_t grows in the first step."""
    distinct = steps.unique().flip(0)
    between = 1 + int(bool((distinct % 1 != 0).any()))  # every second timestep of KDPM2 is an intermediate one
    if len(distinct) <= between:
        return 1.0
    return float((alphas_cumprod[int(distinct[between])] / alphas_cumprod[int(distinct[0])]).sqrt())


def _is_even(scheduler: Any, num_inference_steps: int) -> bool:
    """Return whether all timesteps are `T // S` apart, by their spacing: PNDM's list repeats some and adds others."""
    total, spacing = scheduler.config.num_train_timesteps, scheduler.config.timestep_spacing
    if spacing == "trailing":
        return total % num_inference_steps == 0
    return spacing == "leading" or num_inference_steps == total
