"""Options of sampling and editing. Fast to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.utils.files import check_free
from hf_ddpm.utils.options import option, require, require_at_least, require_color, require_types

# Images per shard, for any batch size and number of processes: a killed process loses fewer images than this.
SHARD_SIZE = 256


@dataclass
class SampleConfig:
    """Model, number of images and output."""

    model: str = option("folder or Hub id of a DDPM pipeline (hf_ddpm or diffusers)")
    output: str = option("output folder")
    num_images: int = option("number of images", 64)
    format: Literal["png", "npz"] = option(
        "png: one file per image (1, 3 or 4 channels); npz: all images in one array (any channels)", "png"
    )
    batch_size: int = option(f"batch size per process; values above {SHARD_SIZE} act like {SHARD_SIZE}", 64)
    compile: bool = option("compile the network first; faster for many images", False)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "num_images", "batch_size")
        require(self, "output", not Path(self.output).is_file(), "a folder, not a file")


@dataclass
class Sampling:
    """Sampling: together with the model, these options determine image i."""

    seed: int = option("random seed; image i of a seed is always the same", 0)
    num_inference_steps: int | None = option("steps of the reverse process (default: all steps of the model)", None)
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc", "pndm", "euler"] = option(
        "sampler; ddpm is the model's own", "ddpm"
    )
    eta: float = option("noise of ddim: 0 is deterministic, 1 is like ddpm", 0.0)
    class_labels: list[str] = option("names or numbers of classes, assigned to the images in turn", factory=list)
    guidance_scale: float = option("scale of classifier-free guidance; 1 for none", 1.0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network; auto: bf16 if the device supports it and is faster with it, else no, which is "
        "float32; for nll, auto is no",
        "auto",
    )
    variance: Literal["model", "fixed_small", "fixed_large"] | None = option(
        "variance of ddpm steps (default: the model's, except that fixed_small replaces fixed_large when sampling in "
        "fewer than all steps, to avoid grain)",
        None,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps")
        require(self, "eta", 0 <= self.eta <= 1, "a number in [0, 1]")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"--eta {self.eta}: expected 0 with --scheduler {self.scheduler}; or use --scheduler ddim")
        require_at_least(self, 0, "seed")
        if self.variance is not None:
            require(
                self,
                "variance",
                self.scheduler == "ddpm",
                f"not supported with --scheduler {self.scheduler}; expected --scheduler ddpm",
            )

    def steps(self, pipe: Any) -> int:
        """Return the number of sampling steps for a pipeline."""
        return self.num_inference_steps or int(pipe.default_steps)

    def replaced_variance(self, own: str, total: int) -> str | None:
        """Return the variance type that replaces the model's `own` for a process of `total` steps; None to keep it."""
        if self.scheduler != "ddpm" or self.variance == "model":
            return None
        own = own.removesuffix("_log")
        small = own == "fixed_large" and (self.num_inference_steps or total) < total
        chosen = self.variance or ("fixed_small" if small else own)
        return None if chosen == own else chosen

    def labels(self, pipe: Any) -> list[int | str]:
        """Return the classes in the form that a pipeline accepts: names, or indices as integers.

        If the classes have names, "2" is a name, never an index, so that its meaning is unambiguous.
        """
        return [label if pipe.class_names or not label.isdecimal() else int(label) for label in self.class_labels]


@dataclass(kw_only=True)
class EditConfig:
    """Model, input images and output of an edit."""

    model: str = option("folder or Hub id of a DDPM pipeline (hf_ddpm or diffusers)")
    images: str = option("image file, or folder of images (not its subfolders); other sizes are resized and cropped")
    output: str = option("output folder, new or empty")
    seed: int = option("random seed; image i of a folder, sorted by name, gets the noise of sample i", 0)
    class_labels: list[str] = option("names or numbers of classes, assigned to the images in turn", factory=list)
    guidance_scale: float = option("scale of classifier-free guidance; 1 for none", 1.0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "precision of the network; auto: bf16 if the device supports it and is faster with it, else no, which is "
        "float32",
        "auto",
    )
    background: str = option("background color of transparent pixels, unless the model has 4 channels", "white")
    batch_size: int = option("batch size per process", 64)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "batch_size")
        require_color(self, "background")
        check_free(Path(self.output))


@dataclass(kw_only=True)
class InpaintConfig:
    """Inpaint images: fill the masked pixels and keep the others unchanged (RePaint)."""

    masks: str = option(
        "one mask file for all images, or folder of masks with the same names as the images; white marks the pixels to "
        "fill; same size as the model or the images"
    )
    num_inference_steps: int | None = option("steps of the reverse process (default: 250, or all if fewer)", None)
    jump_length: int = option("number of steps that RePaint jumps back", 10)
    jump_n_sample: int = option("passes over each block of jump_length steps; 1 disables jumps", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps", "jump_length", "jump_n_sample")


@dataclass
class VaryConfig:
    """Vary images: add noise and remove it again (SDEdit)."""

    strength: float = option("amount of noise, in (0, 1]: near 0 keeps the image, 1 keeps nothing of it", 0.5)
    num_inference_steps: int | None = option("steps of the reverse process (default: all steps up to strength)", None)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require(self, "strength", 0 < self.strength <= 1, "a number in (0, 1]")
        require_at_least(self, 1, "num_inference_steps")


@dataclass
class InvertConfig:
    """Invert images: find their noise, and reconstruct them from it (DDIM inversion)."""

    num_inference_steps: int = option("steps in each direction", 100)
    num_iterations: int = option("evaluations of the network per inversion step", 3)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "num_inference_steps", "num_iterations")
