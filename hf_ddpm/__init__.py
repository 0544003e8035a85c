"""Denoising Diffusion Probabilistic Models (Ho et al. 2020) as a Hugging Face package.

The functions `train`, `distill`, `sample_images`, `evaluate` and `push_to_hub` are the commands of `hf-ddpm`; `Config`,
`Sampling` and `EvaluateConfig` hold their options. The public interface is `__all__`; everything else may change.

Each public name loads its module on first use. So `import hf_ddpm` is fast, and `GaussianDiffusion` does not import
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Config": "hf_ddpm.config",
    "DDIMScheduler": "hf_ddpm.schedulers.scheduling_ddim",
    "DDPMPipeline": "hf_ddpm.pipelines.pipeline_ddpm",
    "DDPMScheduler": "hf_ddpm.schedulers.scheduling_ddpm",
    "EvaluateConfig": "hf_ddpm.evaluation.options",
    "GaussianDiffusion": "hf_ddpm.diffusion",
    # The diffusers loader looks up base classes in the library of a component.
    "ModelMixin": "diffusers",
    "Sampling": "hf_ddpm.sampling.options",
    "SchedulerMixin": "diffusers",
    "UNet2DModel": "hf_ddpm.models.unet_2d",
    "distill": "hf_ddpm.cli.stages",
    "evaluate": "hf_ddpm.evaluation.evaluate",
    "find_scheduler": "hf_ddpm.sampling.samplers",
    "push_pipeline": "hf_ddpm.hub.share",  # not public; here because pipelines must not import hub
    "push_to_hub": "hf_ddpm.cli.push",
    "sample_images": "hf_ddpm.sampling.generate",
    "train": "hf_ddpm.cli.session",
}

__all__ = [
    "Config",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "EvaluateConfig",
    "GaussianDiffusion",
    "ModelMixin",
    "Sampling",
    "SchedulerMixin",
    "UNet2DModel",
    "distill",
    "evaluate",
    "find_scheduler",
    "push_to_hub",
    "sample_images",
    "train",
]

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from hf_ddpm.cli.push import push_to_hub
    from hf_ddpm.cli.session import train
    from hf_ddpm.cli.stages import distill
    from hf_ddpm.config import Config
    from hf_ddpm.diffusion import GaussianDiffusion
    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.evaluation.options import EvaluateConfig
    from hf_ddpm.hub.share import push_pipeline as push_pipeline
    from hf_ddpm.models.unet_2d import UNet2DModel
    from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
    from hf_ddpm.sampling.generate import sample_images
    from hf_ddpm.sampling.options import Sampling
    from hf_ddpm.sampling.samplers import find_scheduler
    from hf_ddpm.schedulers.scheduling_ddim import DDIMScheduler
    from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
