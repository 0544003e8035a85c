"""Options of an evaluation."""

from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any

from hf_ddpm.config import Config, ImageOptions, parse_config
from hf_ddpm.utils.options import option, require, require_at_least, require_types, require_value
from hf_ddpm.utils.runs import run_folder

# Metrics, with the minimum number of generated and of real images.
METRICS = {"fd": 2, "kid": 2, "is": 1, "pr": 4, "nll": 1}
SYNONYMS = {"fid": "fd"}

# Options that do not affect the results of a model.
UNRELATED_OPTIONS = ("model", "samples", "batch_size", "compile", "output", "save_reference_stats")


@dataclass
class ReferenceOptions(ImageOptions):
    """Real images to compare generated images with, and options of the comparison."""

    reference_split: str = option(
        "split to compare generated images with (default: the run's training split, else train)", ""
    )
    split: str = option("held-out split, used by nll and --floor (default: the run's held-out split, else test)", "")
    floor: bool = option("also evaluate the same number of held-out real images: the best value to expect", True)
    extractor: str | None = option(
        'feature extractor: digits, inception (needs pip install -c constraints.txt -e ".[inception]"), or a folder or '
        "Hub id of an image model (default: digits for dataset digits, else inception)",
        None,
    )
    extractor_weights: str | None = option("weights file of extractor inception (default: download them)", None)
    batch_size: int = option("batch size per process", 256)


@dataclass
class EvaluateConfig(ReferenceOptions):
    """Evaluation: model or samples, metrics, real images.

    Args:
        prefix: Prefix of option names in error messages: `eval_` for an evaluation during training.
    """

    prefix: InitVar[str] = ""

    model: str | None = option("folder or Hub id of a DDPM pipeline of hf_ddpm or diffusers", None)
    samples: str | None = option(
        "existing samples: a .npz or .npy file, or a folder of PNG files, of one .npz file, or written by hf-ddpm "
        "sample (default: sample from --model)",
        None,
    )
    reference_stats: str | None = option(
        "fd: .npz file with mean mu and covariance sigma of features, to compare with instead of the reference split; "
        "fd and is then need no dataset",
        None,
    )
    save_reference_stats: str | None = option("file for mu and sigma of the reference split", None)
    metrics: str = option(f"metrics, separated by commas: {', '.join(METRICS)}", "nll")
    num_images: int | None = option("number of images to evaluate on (default: all of the held-out split)", None)
    steps_per_image: int | None = option(
        "nll: number of steps evaluated per image, for an estimate (default: all)", None
    )
    compile: bool = option("compile the network first; faster for many images", False)
    output: str = option("results file", "results.json")

    def __post_init__(self, prefix: str) -> None:
        """Check the values."""
        require_types(self)
        self.option_prefix = prefix
        super().__post_init__()
        take_from_run(self, self.model if self.reference_stats is None else None)
        for metric in self.metrics.split(","):
            is_known = SYNONYMS.get(metric, metric) in METRICS
            require_value(f"{prefix}metrics", metric, is_known, f"any of {', '.join(METRICS)}, separated by commas")
        require_at_least(self, 1, "num_images", "batch_size")
        require(self, "output", not Path(self.output).is_dir(), "is a folder; expected a file")
        self._check_real_images()
        if self.levels is None:
            self.levels = default_levels(self.dataset)
        require(self, "levels", not self.compared or self.levels <= 256, "2 to 256 for metrics of generated images")
        if self.extractor is None:
            self.extractor = "digits" if self.dataset == "digits" else "inception"
        weights = self.extractor_weights
        is_inception = weights is None or self.extractor == "inception"
        reason = f"does not apply to extractor {self.extractor!r}; expected extractor inception"
        require(self, "extractor_weights", is_inception, reason)
        is_file = weights is None or Path(weights).is_file()
        require(self, "extractor_weights", is_file, "file does not exist; expected a weights file")
        if self.model is None and (self.samples is None or "nll" in self.chosen):
            if self.samples is None:
                raise ValueError("--model is missing: expected --model or --samples")
            default = " (default)" if self.metrics == "nll" else ""
            raise ValueError(
                f"--{prefix}metrics {self.metrics}{default}: needs --model; with --samples, expected fd, kid, is or pr"
            )
        require(self, "compile", not (self.compile and self.model is None), "has no effect; expected --model")
        path = None if self.samples is None else Path(self.samples)
        exists = path is None or path.exists()
        require(self, "samples", exists, "does not exist; expected a folder, or a .npz or .npy file")
        is_array = path is None or path.is_dir() or path.suffix in (".npy", ".npz")
        require(self, "samples", is_array, "a folder, or a .npz or .npy file")

    def _check_real_images(self) -> None:
        """Raise a `ValueError` if the real images or statistics of a metric are missing."""
        stats, target = self.reference_stats, self.save_reference_stats
        exists = stats is None or Path(stats).is_file()
        require(self, "reference_stats", exists, "file does not exist; expected a .npz file of mu and sigma")
        is_used = stats is None or "fd" in self.chosen
        require(self, "reference_stats", is_used, f"has no effect; expected fd in --{self.option_prefix}metrics")
        is_file = target is None or not Path(target).is_dir()
        require(self, "save_reference_stats", is_file, "is a folder; expected a file")
        is_used = target is None or bool(self.compared)
        reason = f"has no effect; expected fd, kid, is or pr in --{self.option_prefix}metrics"
        require(self, "save_reference_stats", is_used, reason)
        if self.dataset is None:
            if stats is None or target is not None:
                raise ValueError(
                    "--dataset is missing: expected --dataset NAME, or the folder of a run as --model; fd and is need "
                    "no dataset with --reference_stats FILE.npz"
                )
            for metric in self.chosen:
                reason = "needs real images; expected --dataset, since --reference_stats has only mean and covariance"
                require_value(f"{self.option_prefix}metrics", metric, metric in ("fd", "is"), reason)
        is_same = self.floor and self.split == self.reference_split and bool(self.distances)
        allowed = (
            f"equals the reference split, so there are no held-out images; expected another split, or "
            f"--{self.option_prefix}floor false"
        )
        require_value(f"{self.option_prefix}split", self.split, not is_same, allowed)

    @property
    def pixel_values(self) -> int:
        """The number of values of a pixel: `levels`, which `__post_init__` has set."""
        assert self.levels is not None
        return self.levels

    @property
    def distances(self) -> set[str]:
        """The selected metrics that compare with real images."""
        return {"fd", "kid", "pr"} & set(self.chosen)

    @property
    def chosen(self) -> list[str]:
        """The selected metrics, with synonyms replaced and without duplicates."""
        return list(dict.fromkeys(SYNONYMS.get(metric, metric) for metric in self.metrics.split(",")))

    @property
    def compared(self) -> list[str]:
        """The selected metrics of generated images."""
        return [metric for metric in self.chosen if metric != "nll"]

    @property
    def needs_held_out(self) -> bool:
        """Whether the held-out split is needed."""
        return "nll" in self.chosen or bool(self.floor and self.distances and self.dataset is not None)

    def without_held_out(self, only: str) -> str:
        """Return the options that make the metrics work with a dataset of only one split."""
        split = f"--{self.option_prefix}split {only}" if "nll" in self.chosen else ""
        floor = f"--{self.option_prefix}floor false" if self.floor and self.distances else ""
        return f"{split} {floor}".strip()

    def count(self, held_out: int | None, reference: int | None, samples: int | None) -> int:
        """Return the number of images to evaluate on.

        Args:
            held_out: Number of images in the held-out split; None if it is not needed.
            reference: Number of images in the reference split; None if it is not needed.
            samples: Number of existing samples, if any.

        Raises:
            ValueError: If `num_images` exceeds the number of images, or is too small for a metric.
        """
        name = f"{self.option_prefix}num_images"
        if self.compared and samples is not None and self.num_images is None:
            count = samples if held_out is None else min(samples, held_out)
        else:
            count = self.num_images or held_out or reference or 0
            if not count:
                raise ValueError(
                    f"--{name} is missing: expected the number of images to sample, as there is no dataset"
                )
        if held_out is not None and count > held_out:
            only = self.compared and "nll" not in self.chosen
            hint = f", or --{self.option_prefix}floor false" if only else ""
            images = f"at most the {held_out} images in split {self.split!r} of {self.dataset!r}"
            require_value(name, count, False, images + hint)
        if self.compared and samples is not None:
            require_value(name, count, count <= samples, f"at most the {samples} images of --samples {self.samples}")
        for metric in self.chosen:
            require_value(name, count, count >= METRICS[metric], f"at least {METRICS[metric]} for {metric}")
            if metric in self.distances and reference is not None and reference < METRICS[metric]:
                split = f"split {self.reference_split!r}"
                raise ValueError(f"{split}: {reference} images; expected at least {METRICS[metric]} for {metric}")
        return count


def take_from_run(options: ReferenceOptions, model: str | None) -> None:
    """Fill in missing options: if no dataset is given, from the run of the model; then the default splits."""
    run = None if model is None or options.dataset is not None else run_folder(model) / "config.yaml"
    if run is not None and run.is_file():
        of_run = real_images(parse_config(["--config", str(run)]))
        options.floor = of_run.pop("floor") and options.floor
        for name, value in of_run.items():
            setattr(options, name, getattr(options, name) or value)
    options.split, options.reference_split = options.split or "test", options.reference_split or "train"


def training_request(config: Config) -> EvaluateConfig:
    """Return the options that evaluate a run during training."""
    options = config.evaluation
    return EvaluateConfig(
        prefix="eval_",
        model=config.training.output_dir,
        metrics=options.eval_metrics,
        num_images=options.eval_num_images,
        steps_per_image=options.eval_steps_per_image,
        batch_size=config.training.train_batch_size,
        **real_images(config),
    )


def default_levels(dataset: str | None) -> int:
    """Return the default number of evenly spaced pixel values of a dataset."""
    return 17 if dataset == "digits" else 256


def real_images(config: Config) -> dict[str, Any]:
    """Return the options of an `EvaluateConfig` on the real images of a run."""
    shared = {field.name: getattr(config.data, field.name) for field in fields(ImageOptions)}
    if shared["background"] == "white":
        shared["background"] = None  # as in results of older versions without this option
    options = config.evaluation
    return shared | {
        "reference_split": config.data.split,
        "split": options.eval_split,
        "floor": options.eval_floor,
        "extractor": options.eval_extractor,
    }
