"""A distillation stage as a training run: the teacher, the objective and the sampler of the student."""

from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_ddpm.config import Config
from hf_ddpm.diffusion.distillation import Distillation, halved
from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.diffusion.outputs import split_output
from hf_ddpm.diffusion.schedules import trailing_timesteps
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.options import require, require_value

# Scheduler options that a student copies from its teacher.
KEPT = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
)
# Named noise schedules that `diffusers.DDIMScheduler` supports.
DDIM_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class Teacher:
    """Estimate of x_0 by a frozen network, with guidance and clipping as in sampling; an `Estimate`.

    Args:
        pipe: The teacher's pipeline, on the device.
        process: The process with the teacher's steps, see `halved`.
        accelerator: The accelerator, whose precision is used.
        guidance_scale: Scale of classifier-free guidance; 1 for none.
    """

    def __init__(self, pipe: DDPMPipeline, process: GaussianDiffusion, accelerator: Accelerator, guidance_scale: float):
        self.pipe, self.process, self.accelerator, self.guidance_scale = pipe, process, accelerator, guidance_scale
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.times = process.timesteps.to(accelerator.device)
        pipe.unet.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, classes: Tensor | None) -> Tensor:
        """Return the estimate of `x_0`, float32, with the shape of `x_t`."""
        with self.accelerator.autocast():
            output = self.pipe.predict(x_t, self.times[t], classes, self.guidance_scale)
        prediction, _ = split_output(output.float(), x_t.shape[1])
        kind = self.scheduler.config.prediction_type
        return self.scheduler.bound(self.process.predict_start(prediction, x_t, t, kind))


def open_teacher(config: Config, accelerator: Accelerator) -> tuple[GaussianDiffusion, Distillation | Objective, str]:
    """Load the teacher; return the student's process, its objective and the teacher's checksum.

    Raises:
        ValueError: If the teacher cannot be loaded, or an option does not fit it.
    """
    options = config.distillation
    assert options.teacher is not None and options.student_steps is not None
    pipe = load_pipeline(options.teacher, accelerator.device)
    is_guided = options.teacher_guidance != 1
    is_supported = not is_guided or pipe.null_class is not None
    require(options, "teacher_guidance", is_supported, "1, because the teacher was not trained for guidance")
    process, kind = DDPMScheduler.from_config(pipe.scheduler.config).diffusion, config.diffusion.prediction_type
    if options.student_target == "images":
        student = process.respaced(trailing_timesteps(len(process), options.student_steps))
        return student, Objective("truncated_snr", kind), model_checksum(pipe)
    student, halves = halved(process, options.student_steps)
    estimate = Teacher(pipe, halves, accelerator, options.teacher_guidance)
    return student, Distillation(estimate, halves, kind), model_checksum(pipe)


def student_scheduler(scheduler: DDPMScheduler, config: Config) -> Any:
    """Return the DDIM sampler of a student with `S` steps, a diffusers scheduler if possible.

    DDIM steps of the diffusers scheduler lead from $t$ to $t - T / S$. If `S` does not divide `T`, the result is this
    package's `DDIMScheduler`, which diffusers cannot load.

    Args:
        scheduler: The scheduler of the teacher.
        config: The options, with the student's steps and prediction type.

    Raises:
        ValueError: If the process has fewer than `S` steps, or the teacher cannot take `2 S` steps.
    """
    total, steps = len(scheduler), config.distillation.student_steps or len(scheduler)
    require_value("student_steps", steps, steps <= total, f"at most {total}, the number of diffusion steps")
    if config.distillation.student_target == "teacher":
        halved(scheduler.diffusion, steps)
    kept = {name: scheduler.config[name] for name in KEPT}
    if kept["trained_betas"] is None and kept["beta_schedule"] not in DDIM_SCHEDULES:
        betas = scheduler.diffusion.betas.tolist()
        kept |= {"beta_schedule": "linear", "trained_betas": betas, "rescale_betas_zero_snr": False}
    kind = DDIMScheduler if total % steps else diffusers.DDIMScheduler
    return kind(**kept, prediction_type=config.diffusion.prediction_type, timestep_spacing="trailing")
