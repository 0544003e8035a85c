"""Options of the figures; imports no slow modules, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from hf_ddpm.config import DiffusionConfig
from hf_ddpm.evaluation.options import ReferenceOptions, take_from_run
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.options import option, require, require_at_least, require_distinct

SCHEDULES = get_args(get_type_hints(DiffusionConfig)["beta_schedule"])
SAMPLERS = [name for name in get_args(get_type_hints(Sampling)["scheduler"]) if name != "ddpm"]
# The rows of Table 2, see `hf_ddpm.paper.ablation.ROWS`.
ROWS = [f"{target}-{objective}" for target in ("mean", "epsilon") for objective in ("learned", "fixed", "simple")]


@dataclass(kw_only=True)
class FigureOptions(ReferenceOptions):
    """Figures: model, data and output folder. Data options default to the options of the model's run."""

    model: str = option("folder or Hub id of a DDPM pipeline, from hf_ddpm or diffusers")
    output: str = option("output folder of the figures", "figures")
    seed: int = option("random seed", 0)
    class_labels: list[str] = option("names or indices of classes, used in turn for the images", factory=list)
    guidance_scale: float = option("scale of classifier-free guidance; 1 for none", 1.0)

    def __post_init__(self) -> None:
        """Check the values, and take the data options from the model's run."""
        output = Path(self.output)
        no_file = not any(path.is_file() for path in (output, *output.parents))
        require(self, "output", no_file, "is a file or lies below a file; expected a folder")
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "batch_size")
        super().__post_init__()
        take_from_run(self, self.model)


@dataclass
class DistanceOptions:
    """Options of figures with distances between generated and real images."""

    num_images: int = option("generated images, at least 2", 100)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 2, "num_images")


@dataclass
class VisibleOptions:
    """Options of figures with diffused real images."""

    diffused: list[int] = option(
        "timesteps t to show, from 1 to T (default: eighths of T at which the image is still visible)", factory=list
    )


@dataclass
class ProgressiveOptions:
    """Estimates of images during sampling (Figs. 6, 10): a picture, an animation, and distances."""

    shown: int = option("images in the picture", 8)
    columns: int = option("timesteps in the picture and for the distances", 11)
    frames: int = option("timesteps in the animation", 51)
    num_images: int = option("samples for the distance per timestep, at least 2; 0 for no distances", 100)
    animation: Literal["gif", "webp"] = option("format of the animation", "gif")

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "shown")
        require_at_least(self, 2, "columns")
        require(self, "frames", self.frames >= self.columns, f"at least --columns {self.columns}")
        require(self, "num_images", self.num_images == 0 or self.num_images >= 2, "0 or at least 2")


@dataclass
class SharedLatentOptions:
    """Several images from the same latent, for several timesteps (Fig. 7), and their differences."""

    diffused: list[int] = option("timesteps t to show, from 1 to T (default: quarters of T)", factory=list)
    latents: int = option("number of latents; the picture shows the first two", 4)
    num_images: int = option("images per latent, at least 2", 6)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "latents")
        require_at_least(self, 2, "num_images")


@dataclass
class InterpolateOptions(VisibleOptions):
    """Interpolation between two images at several timesteps (Figs. 8, 9)."""

    first: str | None = option("file of the first image", None)
    second: str | None = option("file of the second image", None)
    rows: list[int] = option(
        "without files: indices of two held-out images (default: the least similar two of the first 16)", factory=list
    )
    weights: list[float] = option(
        "weights of the second image, in [0, 1]", factory=lambda: [tenth / 10 for tenth in range(11)]
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "second", (self.first is None) == (self.second is None), "both --first and --second, or neither")
        require(self, "rows", len(self.rows) in (0, 2) and min(self.rows, default=0) >= 0, "two indices, at least 0")
        require(self, "weights", all(0 <= weight <= 1 for weight in self.weights), "numbers in [0, 1]")


@dataclass
class RateDistortionOptions:
    """Rate and distortion of progressive decoding (Fig. 5, Table 4)."""

    num_images: int = option("held-out images; each needs T network evaluations", 50)
    rows: int = option("rows of the table", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images")
        require_at_least(self, 2, "rows")


@dataclass
class LossyReconstructOptions(VisibleOptions):
    """Progressive reconstruction of real images: estimates and samples, with rate and distortion."""

    num_images: int = option("held-out images", 4)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images")


@dataclass
class InpaintingOptions:
    """Inpainting of held-out images with four masks (RePaint), several results each."""

    num_images: int = option("held-out images", 2)
    fills: int = option("results per image and mask, at least 2", 4)
    num_inference_steps: int = option("sampling steps without jumps; at most all T", 250)
    jump_length: int = option("length of a jump in steps", 10)
    jump_n_sample: int = option("repeats of each part of jump_length steps; 1 for no jumps", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images", "num_inference_steps", "jump_length", "jump_n_sample")
        require_at_least(self, 2, "fills")


@dataclass
class NearestNeighborsOptions(DistanceOptions):
    """Samples closest to a training image, by pixels and by features (Figs. 12, 15)."""


@dataclass
class StepsOptions(DistanceOptions):
    """Distance to real images against the number of steps, for each sampler."""

    steps: list[int] = option(
        "numbers of steps (default: 10 20 50 100)",
        factory=list,
    )
    all_steps: bool = option("also measure the DDPM sampler of the paper with all steps, which takes longest", True)
    samplers: list[str] = option(
        f"samplers in addition to DDPM, any of {', '.join(SAMPLERS)}", factory=lambda: list(SAMPLERS)
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "samplers", set(self.samplers) <= set(SAMPLERS), f"any of {', '.join(SAMPLERS)}")
        require_distinct(self, "samplers")


@dataclass
class DistillationOptions(DistanceOptions):
    """Distance of a model and its distilled students against the number of steps, and samples from the same noise."""

    distilled: str = option("output folder of hf-ddpm distill for this model", "")
    steps: list[int] = option("numbers of steps of the model (default: the steps of the stages, and all)", factory=list)
    within: float = option("largest ratio to the model's best distance at which a student is considered as good", 1.5)
    shown: int = option("samples per row of the picture", 12)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        is_folder = Path(self.distilled).is_dir() and bool(self.distilled)
        require(self, "distilled", is_folder, "an output folder of hf-ddpm distill")
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "within", self.within >= 1, "at least 1")
        require_at_least(self, 1, "shown")


@dataclass
class SchedulesOptions:
    """Loss and bits per timestep of one network with several noise schedules."""

    schedules: list[str] = option(f"any of {', '.join(SCHEDULES)}", factory=lambda: ["linear", "squaredcos_cap_v2"])
    num_images: int = option("held-out images; each needs T network evaluations per schedule", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "schedules", set(self.schedules) <= set(SCHEDULES), f"any of {', '.join(SCHEDULES)}")
        require_distinct(self, "schedules")
        require_at_least(self, 1, "num_images")


@dataclass
class AllOptions(DistanceOptions):
    """All figures except distillation and ablation, and one report: report.md."""


@dataclass
class AblationOptions(DistanceOptions):
    """Ablation of Table 2: trains one run per prediction target, objective and seed."""

    output: str = option("output folder of the figure and the runs", "figures")
    preset: str = option("preset for all other training options", "digits")
    config: str | None = option("YAML file with more training options", None)
    rows: list[str] = option("any of " + ", ".join(ROWS), factory=lambda: list(ROWS))
    seeds: list[int] = option("seeds of the runs per row", factory=lambda: [0, 1, 2])
    max_train_steps: int | None = option("optimizer steps (default: the steps of the preset)", None)
    num_inference_steps: int | None = option(
        "sampling steps (default: all; predicted means and learned variances need all)", None
    )
    launcher: str = option("command that runs a script instead of python, such as accelerate launch", "")

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "output", not Path(self.output).is_file(), "is a file; expected a folder")
        require(self, "rows", set(self.rows) <= set(ROWS), f"any of {', '.join(ROWS)}")
        require(self, "seeds", bool(self.seeds) and min(self.seeds) >= 0, "one or more seeds, at least 0")
        require_distinct(self, "rows", "seeds")
        require_at_least(self, 1, "max_train_steps", "num_inference_steps")


# The figures of a model by name, in the order of the report.
FIGURES: dict[str, type] = {
    "progressive": ProgressiveOptions,
    "shared-latent": SharedLatentOptions,
    "interpolate": InterpolateOptions,
    "rate-distortion": RateDistortionOptions,
    "lossy-reconstruct": LossyReconstructOptions,
    "inpainting": InpaintingOptions,
    "nearest-neighbors": NearestNeighborsOptions,
    "steps": StepsOptions,
    "schedules": SchedulesOptions,
}
