"""Options of sampling. Imports in milliseconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.utils.files import is_free
from hf_ddpm.utils.options import option, require, require_at_least, require_color, require_types

# Images per shard, whatever the batch size and the number of processes: a kill costs each process at most these.
SHARD_SIZE = 256


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
        require_types(self)
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
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network's passes; auto: bf16 if the device has it and is faster with it, else no (float32); "
        "for nll, auto is no",
        "auto",
    )
    variance: Literal["model", "fixed_small", "fixed_large"] | None = option(
        "variance of the steps of ddpm; by default that of the model, but fixed_small for fixed_large in fewer than "
        "all steps, where the large one leaves grain",
        None,
    )

    def __post_init__(self) -> None:
        """Checks the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps")
        require(self, "eta", 0 <= self.eta <= 1, "in [0, 1]")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta={self.eta} is not allowed with scheduler={self.scheduler}: only with ddim")
        require_at_least(self, 0, "seed")
        if self.variance is not None:
            require(self, "variance", self.scheduler == "ddpm", f"expected no variance with scheduler={self.scheduler}")

    def steps(self, pipe: Any) -> int:
        """Returns the number of steps of a pipeline's process."""
        return self.num_inference_steps or int(pipe.default_steps)

    def replaced_variance(self, own: str, total: int) -> str | None:
        """Returns the variance type that replaces a model's own in its process of `total` steps; None to keep it."""
        if self.scheduler != "ddpm" or self.variance == "model":
            return None
        own = own.removesuffix("_log")
        small = own == "fixed_large" and (self.num_inference_steps or total) < total
        chosen = self.variance or ("fixed_small" if small else own)
        return None if chosen == own else chosen

    def labels(self, pipe: Any) -> list[int | str]:
        """Returns the classes as a pipeline takes them.

        If classes have names, a number is one of the names or wrong: "2" must never mean both a name and an index.
        """
        return [label if pipe.class_names or not label.isdecimal() else int(label) for label in self.class_labels]


@dataclass(kw_only=True)
class EditConfig:
    """Model, pictures and output of an edit."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    images: str = option("file of a picture, or folder of pictures; larger ones are resized and cropped")
    output: str = option("folder of the results, new or empty")
    seed: int = option("random seed; picture i of a folder, sorted by name, gets the noise of sample i", 0)
    class_labels: list[str] = option("names or numbers of classes that the pictures go through in turn", factory=list)
    guidance_scale: float = option("strength of classifier-free guidance; 1 for none", 1.0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network's passes; auto: bf16 if the device has it and is faster with it, else no (float32)",
        "auto",
    )
    background: str = option("color behind transparent pixels, unless the model has 4 channels", "white")
    batch_size: int = option("batch size per process", 64)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_types(self)
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "batch_size")
        require_color(self, "background")
        require(self, "output", is_free(Path(self.output)), "expected a new or empty folder")


@dataclass(kw_only=True)
class InpaintConfig:
    """Fill a part of pictures; the other pixels are kept exactly (RePaint)."""

    masks: str = option(
        "file of one mask for all pictures, or folder of masks with the names of the pictures; of the size of the "
        "model or of the pictures, white where to fill"
    )
    num_inference_steps: int | None = option("steps of the reverse process; by default 250, or all if fewer", None)
    jump_length: int = option("steps that a jump goes back", 10)
    jump_n_sample: int = option("passes through each part of jump_length steps; 1 for no jumps", 10)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps", "jump_length", "jump_n_sample")


@dataclass
class VaryConfig:
    """Make variations of pictures: add noise, and remove it again (SDEdit)."""

    strength: float = option("share of the noise, above 0, at most 1: near 0 keeps a picture, 1 keeps nothing", 0.5)
    num_inference_steps: int | None = option("steps of the reverse process; by default all of that share", None)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_types(self)
        require(self, "strength", 0 < self.strength <= 1, "above 0, at most 1")
        require_at_least(self, 1, "num_inference_steps")


@dataclass
class InvertConfig:
    """Find the noise of pictures, and make them from it again (DDIM inversion)."""

    num_inference_steps: int = option("steps in each direction", 100)
    num_iterations: int = option("passes of the network per step towards the noise", 3)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps", "num_iterations")
