"""Options of the figures. Imports nothing slow: `--help` needs them."""

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
    """Model, data and folder of the figures; data and splits are those of the run of the model by default."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the figures", "figures")
    seed: int = option("random seed", 0)

    def __post_init__(self) -> None:
        """Check the values, and find the data set of a model of a run."""
        output = Path(self.output)
        no_file = not any(path.is_file() for path in (output, *output.parents))
        require(self, "output", no_file, "a file stands there, a folder is wanted")
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
class DiffusedOptions:
    """Options of figures of moments of the process."""

    diffused: list[int] = option("moments: steps of diffusion, from 1 to T; quarters of T by default", factory=list)


@dataclass
class InformedOptions:
    """Options of figures of images that are diffused."""

    diffused: list[int] = option(
        "moments: steps of diffusion, from 1 to T; by default the eighths of T after which images are still seen",
        factory=list,
    )


@dataclass
class ProgressiveOptions:
    """Estimates of images while they are sampled (Figs. 6, 10): a picture, an animation, and distances."""

    shown: int = option("images in the picture", 8)
    columns: int = option("moments in the picture, and of the distances", 11)
    frames: int = option("moments in the animation", 51)
    num_images: int = option("images for the distance at each moment, at least 2; 0 for no distances", 100)
    animation: Literal["gif", "webp"] = option("format of the animation", "gif")

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "shown")
        require_at_least(self, 2, "columns")
        require(self, "frames", self.frames >= self.columns, f"at least columns={self.columns}")
        require(self, "num_images", self.num_images == 0 or self.num_images >= 2, "0, or at least 2")


@dataclass
class SharedLatentOptions(DiffusedOptions):
    """Several images from one latent, at several moments of the process (Fig. 7), and how much they differ."""

    latents: int = option("latents; the first two are shown", 4)
    num_images: int = option("images per latent, at least 2", 6)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "latents")
        require_at_least(self, 2, "num_images")


@dataclass
class InterpolateOptions(InformedOptions):
    """Two images mixed after some steps of diffusion, and denoised (Figs. 8, 9)."""

    first: str | None = option("file of an image", None)
    second: str | None = option("file of another image", None)
    rows: list[int] = option(
        "without files: indices of two held-out images; by default the least alike of the first 16", factory=list
    )
    weights: list[float] = option(
        "weights of the second image, in [0, 1]", factory=lambda: [tenth / 10 for tenth in range(11)]
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "second", (self.first is None) == (self.second is None), "both files, or none")
        require(self, "rows", len(self.rows) in (0, 2) and min(self.rows, default=0) >= 0, "two numbers, at least 0")
        require(self, "weights", all(0 <= weight <= 1 for weight in self.weights), "in [0, 1]")


@dataclass
class RateDistortionOptions:
    """Rate and distortion of progressive decoding (Fig. 5, Table 4)."""

    num_images: int = option("held-out images; each takes T evaluations of the network", 50)
    rows: int = option("rows of the table", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images")
        require_at_least(self, 2, "rows")


@dataclass
class LossyReconstructOptions(InformedOptions):
    """Progressive reconstruction of real images: estimates and samples, with their rate and distortion."""

    num_images: int = option("held-out images", 4)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images")


@dataclass
class InpaintingOptions:
    """Held-out images with four masks, filled several times each (RePaint)."""

    num_images: int = option("held-out images", 2)
    fills: int = option("fills per image and mask, at least 2", 4)
    num_inference_steps: int = option("steps of the reverse process; all if there are fewer", 250)
    jump_length: int = option("steps that a jump goes back", 10)
    jump_n_sample: int = option("passes through each part of jump_length steps", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "num_images", "num_inference_steps", "jump_length", "jump_n_sample")
        require_at_least(self, 2, "fills")


@dataclass
class NearestNeighborsOptions(DistanceOptions):
    """The samples that are nearest to a training image, by pixels and by features (Figs. 12, 15)."""


@dataclass
class StepsOptions(DistanceOptions):
    """Distance to real images against the number of steps, for each sampler."""

    steps: list[int] = option(
        "numbers of steps, 10, 20, 50 and 100 by default; the process of the paper takes all of them, too",
        factory=list,
    )
    samplers: list[str] = option(f"beside the paper's, any of {', '.join(SAMPLERS)}", factory=lambda: list(SAMPLERS))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "samplers", set(self.samplers) <= set(SAMPLERS), f"any of {', '.join(SAMPLERS)}")
        require_distinct(self, "samplers")


@dataclass
class DistillationOptions(DistanceOptions):
    """Distance of a model and of what it is distilled to against the number of steps, and samples from one noise."""

    distilled: str = option("folder that hf-ddpm distill made from the model", "")
    steps: list[int] = option("numbers of steps of the model; those of the stages and all by default", factory=list)
    within: float = option("factor of the best distance of the model that counts as reached", 1.5)
    shown: int = option("images of each in the picture", 12)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "distilled", Path(self.distilled).is_dir() and bool(self.distilled), "the folder of --output")
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "within", self.within >= 1, "at least 1")
        require_at_least(self, 1, "shown")


@dataclass
class SchedulesOptions:
    """Loss and bits by timestep of one network with several schedules, by default linear and cosine."""

    schedules: list[str] = option(f"any of {', '.join(SCHEDULES)}", factory=lambda: ["linear", "squaredcos_cap_v2"])
    num_images: int = option("held-out images; each takes T evaluations of the network per schedule", 10)

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "schedules", set(self.schedules) <= set(SCHEDULES), f"any of {', '.join(SCHEDULES)}")
        require_distinct(self, "schedules")
        require_at_least(self, 1, "num_images")


@dataclass
class AllOptions(DistanceOptions):
    """All of these but the ablation, and one report of them: report.md."""


@dataclass
class AblationOptions(DistanceOptions):
    """Table 2: trains with either prediction and each objective, from several seeds; takes a run for each."""

    output: str = option("folder of the figures; the runs are below it", "figures")
    preset: str = option("what is trained otherwise", "digits")
    config: str | None = option("YAML file of further options", None)
    rows: list[str] = option("any of " + ", ".join(ROWS), factory=lambda: list(ROWS))
    seeds: list[int] = option("seeds of the runs of a row", factory=lambda: [0, 1, 2])
    max_train_steps: int | None = option("optimizer steps; those of the preset by default", None)
    num_inference_steps: int | None = option("sampling steps; all by default, which means and variances need", None)
    launcher: str = option("command that starts a script in place of python, such as accelerate launch", "")

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "output", not Path(self.output).is_file(), "it is a file, a folder is wanted")
        require(self, "rows", set(self.rows) <= set(ROWS), f"any of {', '.join(ROWS)}")
        require(self, "seeds", bool(self.seeds) and min(self.seeds) >= 0, "at least one, at least 0")
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
