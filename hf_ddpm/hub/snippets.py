"""Code snippets of a model card: install, load, sample."""

import json
from typing import Any

import diffusers

from hf_ddpm.images import MODES
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

# The package is not on PyPI and has no URL yet. Change these two lines once it has one.
ADDRESS: str | None = None
INSTALL = "pip install ./hf_ddpm  # a clone of the repository"

STOCK_STEPS = 1000  # default of diffusers.DDPMPipeline, regardless of the model's T


def obstacle(pipe: Any) -> str | None:
    """Return the reason why `diffusers.DDPMPipeline` cannot sample from a model correctly, or None if it can."""
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    is_distilled = type(scheduler) is diffusers.DDIMScheduler and pipe.config.get("num_inference_steps")
    if not is_distilled and type(scheduler) not in (DDPMScheduler, diffusers.DDPMScheduler):
        return f"does not support the {type(scheduler).__name__} of this model"
    if config.get("variance_type") == "learned":
        return "does not support a learned variance"
    if config.prediction_type == "mean":
        return "does not support predictions of the mean"
    if pipe.unet.config.num_class_embeds:
        return "does not support class labels"
    return None


def sampling_call(pipe: Any, stock: bool) -> str:
    """Return the arguments of a sampling call, as Python code.

    Args:
        pipe: The model.
        stock: Write the call for the diffusers pipeline, which takes 1000 steps by default.
    """
    count = pipe.unet.config.num_class_embeds
    if count:
        real = count - (pipe.null_class is not None)
        labels: list[Any] = pipe.class_names[:2] or list(range(min(real, 2)))
        arguments = [f"batch_size={len(labels)}", f"class_labels=[{', '.join(map(literal, labels))}]"]
        if pipe.is_guided:
            arguments.append("guidance_scale=2.0")
    else:
        arguments = ["batch_size=4"]
    steps = pipe.default_steps
    if stock and steps != STOCK_STEPS:
        arguments.append(f"num_inference_steps={steps}")
    if pipe.unet.config.in_channels not in MODES:
        arguments.append('output_type="np"')
    return ", ".join(arguments)


def literal(value: str | int) -> str:
    """Return a value as one line of Python code; JSON would escape an emoji as two surrogates."""
    text = str(value)
    return json.dumps(value) if text.isascii() else repr(text)
