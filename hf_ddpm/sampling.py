"""Images by number: image `i` of a seed is the same in any batch and on any process."""

from collections.abc import Iterator, Sequence

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_ddpm.diffusion.checks import check_one_of
from hf_ddpm.images import to_bytes
from hf_ddpm.seeds import SAMPLES, generator

# Other walks through the same reverse process; None is the pipeline's own.
SCHEDULERS = {"ddpm": None, "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}


def use_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Gives a pipeline the scheduler of that name in `SCHEDULERS`, with the configuration of its own."""
    check_one_of("scheduler", name, tuple(SCHEDULERS))
    if SCHEDULERS[name] is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)


def sample_images(
    pipe: DiffusionPipeline,
    ids: Sequence[int],
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    eta: float = 0.0,
    class_labels: Sequence[int | str] = (),
    guidance_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """Generates images by their numbers.

    Args:
        pipe: The pipeline, on `device`.
        ids: Numbers of the images, at least 0.
        seed: Which infinite row of images the numbers count.
        num_inference_steps: Steps of the reverse process.
        batch_size: Images at a time.
        eta: Noise of a DDIM scheduler, in [0, 1].
        class_labels: Numbers or names of classes that the images go through in turn, for a conditioned network.
        guidance_scale: See `DDPMPipeline`.
        device: Where noise is drawn; the numbers drawn differ between kinds of devices.

    Yields:
        The number of an image and the image, uint8, shape `(C, H, W)`, on the CPU.
    """
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        unit = pipe(
            batch_size=len(chunk),
            generator=[generator(seed, SAMPLES, i, device=device) for i in chunk],
            num_inference_steps=num_inference_steps,
            output_type="pt",
            eta=eta,
            class_labels=[class_labels[i % len(class_labels)] for i in chunk] if class_labels else None,
            guidance_scale=guidance_scale,
        ).images
        yield from zip(chunk, to_bytes(unit).cpu(), strict=True)
