"""The options of sampling. Imports in milliseconds."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_ddpm.utils.options import option, require, require_at_least, require_value

if TYPE_CHECKING:
    import torch

    from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline

# Images a shard, whatever the batch size and the number of processes: a kill costs at most these, of each process.
SHARD_SIZE = 256

# Of samplers: raised when the same settings make other images.
VERSION = 2


@dataclass
class SampleConfig:
    """Samples: of which model, how many, where to."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the images")
    num_images: int = option("number of images", 64)
    format: Literal["png", "npz"] = option(
        "a PNG file per image (1, 3 or 4 channels), or one file of all as an array (any number)", "png"
    )
    batch_size: int = option(f"batch size per process, at most the {SHARD_SIZE} images of a shard", 64)
    compile: bool = option("compile the network first, for many images", False)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "num_images", "batch_size")
        require(self, "output", not Path(self.output).is_file(), "it is a file, a folder is wanted")


@dataclass
class Sampling:
    """Sampling: with the model, all that determines image i."""

    seed: int = option("random seed; image i of a seed is always the same", 0)
    num_inference_steps: int | None = option("steps of the reverse process; all of the model's by default", None)
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc", "pndm", "euler"] = option(
        "sampler; ddpm is the model's own", "ddpm"
    )
    eta: float = option("noise of ddim, from 0 for none to 1 for that of ddpm", 0.0)
    class_labels: list[str] = option("names or numbers of classes that the images go through in turn", factory=list)
    guidance_scale: float = option("strength of classifier-free guidance; 1 for none", 1.0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option("precision of the network's passes", "no")

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "num_inference_steps")
        require(self, "eta", 0 <= self.eta <= 1, "in [0, 1]")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta={self.eta} is not allowed with scheduler={self.scheduler}: only with ddim")
        require_at_least(self, 0, "seed")

    def check(self, pipe: "DDPMPipeline") -> None:
        """Raises a `ValueError` unless the scheduler can walk a pipeline's process in that many steps."""
        from hf_ddpm.sampling.generate import find_scheduler  # takes seconds

        total, count = pipe.scheduler.config.num_train_timesteps, self.steps(pipe)
        least = 4 if self.scheduler == "pndm" else 1  # of Runge and Kutta, to start with
        allowed = f"{least} to {total} with this model and scheduler={self.scheduler}"
        require_value("num_inference_steps", count, least <= count <= total, allowed)
        find_scheduler(pipe, self.scheduler, count)

    def steps(self, pipe: "DDPMPipeline") -> int:
        """Returns the number of steps of a pipeline's process."""
        return self.num_inference_steps or pipe.scheduler.config.num_train_timesteps

    def settings(self, pipe: "DDPMPipeline", model: str, device: "torch.device") -> dict[str, Any]:
        """Returns what determines the images of a pipeline, for a `SampleFolder`."""
        from hf_ddpm.provenance import model_checksum  # takes seconds

        return {
            "model": model,
            "model_checksum": model_checksum(pipe),
            "shape": list(pipe.image_shape),
            "device": device.type,  # other kinds draw other noise
            **asdict(self),
            "num_inference_steps": self.steps(pipe),
            **({"sampler_version": VERSION} if self._is_changed(pipe) else {}),
        }

    def _is_changed(self, pipe: "DDPMPipeline") -> bool:
        """Returns whether earlier versions made other images of these settings: a folder must not mix both."""
        if self.scheduler != "ddpm" or pipe.scheduler.config.prediction_type == "mean":
            return True
        from hf_ddpm.diffusion.gaussian import start_signal  # takes seconds
        from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

        own = DDPMScheduler.from_config(pipe.scheduler.config)
        own.start_signal = start_signal(math.prod(pipe.image_shape[1:]))
        own.set_timesteps(self.steps(pipe))
        return own.timestep_spacing != own.config.timestep_spacing

    def labels(self, pipe: "DDPMPipeline") -> list[int | str]:
        """Returns the classes as a pipeline takes them.

        Where classes have names, a number is one of them or wrong: "2" must not mean now a name, now a place.
        """
        return [label if pipe.class_names or not label.isdecimal() else int(label) for label in self.class_labels]

    def folder_name(self, pipe: "DDPMPipeline", device: "torch.device") -> str:
        """Returns a name for a folder of these images, another one for others."""
        settings = json.dumps(self.settings(pipe, "", device), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:12]
