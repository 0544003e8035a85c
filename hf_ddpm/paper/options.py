"""The options of the figures and tables. Imports in milliseconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.config import Config, DiffusionConfig, parse_config
from hf_ddpm.evaluation.options import real_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.options import (
    choices,
    option,
    require,
    require_at_least,
    require_distinct,
    require_range,
)

SHOWN_LATENTS = 2  # in the picture; more serve the measurement alone
SCHEDULES = choices(DiffusionConfig, "beta_schedule")
OTHERS = [name for name in choices(Sampling, "scheduler") if name != "ddpm"]


@dataclass
class Subject:
    """Figures: of which model, on which data, where to."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the figures", "figures")
    dataset: str | None = option("real images; by default those that the model of a run was trained on", None)
    dataset_config: str | None = option("configuration, for data sets with several ones", None)
    image_column: str | None = option("column of the images; guessed by default", None)
    class_column: str | None = option("column of the classes of a conditioned model; that of the run by default", None)
    split: str | None = option("held-out split; that of the run, else test by default", None)
    reference_split: str | None = option(
        "split that generated images are compared with; that of the run, else train by default", None
    )
    floor: bool = option("whether to compare as many held-out images, too", True)
    enlarge: bool = option("scale up real images that are smaller than those of the model", False)
    skip_bad_images: bool = option("whether to leave out real images that cannot be used", False)
    levels: int | None = option("evenly spaced values that a pixel takes; 17 for digits, else 256 by default", None)
    value_range: list[float] | None = option("floats that become black and white, for images of floats", None)
    extractor: str | None = option("as in evaluate.py; digits for the digits, else inception by default", None)
    extractor_weights: str | None = option("file of the weights of inception; downloaded by default", None)
    seed: int = option("seed of everything random", 0)
    batch_size: int = option("network evaluations at a time and process", 256)

    def __post_init__(self) -> None:
        """Checks the values, and finds the data set beside the model."""
        output = Path(self.output)
        no_file = not any(path.is_file() for path in (output, *output.parents))
        require(self, "output", no_file, "a file stands there, a folder is wanted")
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 2, "levels")
        require_range(self, "value_range")
        run = Path(self.model) / "config.yaml"
        if self.dataset is None and run.is_file():
            found = real_images(parse_config(["--config", str(run)]))
            floor = found.pop("floor")
            self.floor = self.floor and floor
            for name, value in found.items():
                setattr(self, name, getattr(self, name) or value)
        self.split, self.reference_split = self.split or "test", self.reference_split or "train"


@dataclass
class ProgressiveConfig:
    """What is known of images while they are sampled (Figs. 6, 10): a picture, an animation, and distances."""

    shown: int = option("images in the picture", 8)
    columns: int = option("moments in the picture, and of the distances", 11)
    frames: int = option("moments in the animation", 51)
    num_images: int = option("images for the distance at each moment, at least 2; 0 for no distances", 100)
    animation: Literal["gif", "webp"] = option("format of the animation", "gif")

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "shown")
        require_at_least(self, 2, "columns")
        require(self, "frames", self.frames >= self.columns, f"at least columns={self.columns}")
        require(self, "num_images", self.num_images == 0 or self.num_images >= 2, "0, or at least 2")


@dataclass
class SharedLatentConfig:
    """Several images from one latent, at several moments of the process (Fig. 7), and how much they differ."""

    diffused: list[int] = option("moments: steps of diffusion, from 1 to T; quarters of T by default", factory=list)
    latents: int = option(f"latents; the first {SHOWN_LATENTS} are shown", 4)
    num_images: int = option("images of a latent, at least 2", 6)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "latents")
        require_at_least(self, 2, "num_images")


@dataclass
class InterpolateConfig:
    """Two images mixed after some steps of diffusion, and brought back (Figs. 8, 9)."""

    first: str | None = option("file of an image", None)
    second: str | None = option("file of another image", None)
    rows: list[int] = option("without files: numbers of two held-out images", factory=lambda: [0, 1])
    diffused: list[int] = option("steps of diffusion, from 1 to T; quarters of T by default", factory=list)
    weights: list[float] = option(
        "weights of the second image, in [0, 1]", factory=lambda: [tenth / 10 for tenth in range(11)]
    )

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "second", (self.first is None) == (self.second is None), "both files, or none")
        require(self, "rows", len(self.rows) == 2 and min(self.rows) >= 0, "two numbers, at least 0")
        require(self, "weights", all(0 <= weight <= 1 for weight in self.weights), "in [0, 1]")


@dataclass
class RateDistortionConfig:
    """Rate and distortion while an image is received (Fig. 5, Table 4)."""

    num_images: int = option("held-out images; each takes T evaluations of the network", 50)
    rows: int = option("rows of the table", 10)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "num_images")
        require_at_least(self, 2, "rows")


@dataclass
class LossyConfig:
    """Real images, diffused and received again: estimates and samples, with their rate and distortion."""

    num_images: int = option("held-out images", 4)
    diffused: list[int] = option("moments: steps of diffusion, from 1 to T; quarters of T by default", factory=list)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "num_images")


@dataclass
class NearestConfig:
    """Samples and the training images nearest to them, by pixels and by features (Figs. 12, 15)."""

    num_images: int = option("samples to search the nearest among; those that are shown are the nearest of all", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 2, "num_images")


@dataclass
class StepsConfig:
    """Distance to real images against the number of steps, for each sampler."""

    steps: list[int] = option(
        "numbers of steps, 10, 20, 50 and 100 by default; the process of the paper takes all of them, too",
        factory=list,
    )
    samplers: list[str] = option(f"beside the paper's, any of {', '.join(OTHERS)}", factory=lambda: list(OTHERS))
    num_images: int = option("images for each distance, at least 2", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "samplers", set(self.samplers) <= set(OTHERS), f"any of {', '.join(OTHERS)}")
        require_distinct(self, "samplers")
        require_at_least(self, 2, "num_images")


@dataclass
class SchedulesConfig:
    """Loss and bits by timestep of one network with several schedules, by default linear and cosine."""

    schedules: list[str] = option(f"any of {', '.join(SCHEDULES)}", factory=lambda: ["linear", "squaredcos_cap_v2"])
    num_images: int = option("held-out images; each takes T evaluations of the network for each schedule", 10)

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "schedules", set(self.schedules) <= set(SCHEDULES), f"any of {', '.join(SCHEDULES)}")
        require_distinct(self, "schedules")
        require_at_least(self, 1, "num_images")


@dataclass
class AllConfig:
    """All of these but the ablation, and one report of them: report.md."""

    num_images: int = option("images for distances and nearest neighbors, at least 2", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 2, "num_images")


@dataclass(frozen=True)
class Row:
    """A row of the paper's Table 2.

    Attributes:
        title: What it is called.
        words: The options of `hf-ddpm train` that make it.
        paper: Its FID in the paper; None where training was unstable and the samples poor.
    """

    title: str
    words: tuple[str, ...]
    paper: float | None


MEAN, EPSILON = ("--prediction_type", "mean"), ("--prediction_type", "epsilon")
LEARNED = ("--objective", "vlb", "--variance_type", "learned")
FIXED, SIMPLE = ("--objective", "vlb"), ("--objective", "simple")
ROWS = {
    "mean-learned": Row("posterior mean: L, learned diagonal variance", MEAN + LEARNED, 23.69),
    "mean-fixed": Row("posterior mean: L, fixed isotropic variance", MEAN + FIXED, 13.22),
    "mean-simple": Row("posterior mean: squared error", MEAN + SIMPLE, None),
    "epsilon-learned": Row("noise: L, learned diagonal variance", EPSILON + LEARNED, None),
    "epsilon-fixed": Row("noise: L, fixed isotropic variance", EPSILON + FIXED, 13.51),
    "epsilon-simple": Row("noise: squared error (L_simple)", EPSILON + SIMPLE, 3.17),
}


@dataclass
class AblationConfig:
    """Table 2: trains with either prediction and each objective, from several seeds; takes a run for each."""

    output: str = option("folder of the figures; the runs are below it", "figures")
    preset: str = option("what is trained otherwise", "digits")
    config: str | None = option("YAML file of further options", None)
    rows: list[str] = option("any of " + ", ".join(ROWS), factory=lambda: list(ROWS))
    seeds: list[int] = option("seeds of the runs of a row", factory=lambda: [0, 1, 2])
    max_train_steps: int | None = option("optimizer steps; those of the preset by default", None)
    num_images: int = option("images of each run to evaluate on, at least 2", 100)
    num_inference_steps: int | None = option("sampling steps; all by default, which means and variances need", None)
    launcher: str = option("command that starts a script in place of python, such as accelerate launch", "")

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "output", not Path(self.output).is_file(), "it is a file, a folder is wanted")
        require(self, "rows", set(self.rows) <= set(ROWS), f"any of {', '.join(ROWS)}")
        require(self, "seeds", bool(self.seeds) and min(self.seeds) >= 0, "at least one, at least 0")
        require_distinct(self, "rows", "seeds")
        require_at_least(self, 1, "max_train_steps", "num_inference_steps")
        require_at_least(self, 2, "num_images")

    def words(self, row: str, seed: int) -> list[str]:
        """Returns the command line of `hf-ddpm train` for a run."""
        given = {
            "preset": self.preset,
            "config": self.config,
            "seed": seed,
            "output_dir": self.folder(row, seed),
            "max_train_steps": self.max_train_steps,
            "eval_metrics": "",
        }
        return [*command_line(given), *ROWS[row].words]

    def sampling_steps(self, config: Config) -> int:
        """Returns the steps that a run is sampled in; more than its process has raise a `ValueError`."""
        total = config.diffusion.num_train_timesteps
        steps = self.num_inference_steps or total
        require(self, "num_inference_steps", steps <= total, f"at most the {total} of the process")
        return steps

    def folder(self, row: str, seed: int) -> Path:
        """Returns the folder of a run."""
        return Path(self.output) / "ablation" / f"{row}-seed{seed}"


def command_line(given: dict[str, Any]) -> list[str]:
    """Returns options as the words of a command line; None is left to the default."""
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


# By the names of their files, in the order of the report.
FIGURE_OPTIONS: dict[str, type] = {
    "progressive": ProgressiveConfig,
    "shared-latent": SharedLatentConfig,
    "interpolate": InterpolateConfig,
    "rate-distortion": RateDistortionConfig,
    "lossy-reconstruct": LossyConfig,
    "nearest-neighbors": NearestConfig,
    "steps": StepsConfig,
    "schedules": SchedulesConfig,
}
