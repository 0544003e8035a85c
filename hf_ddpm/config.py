"""Options of a training run, from a preset, a YAML file and the command line.

The defaults are the options of the paper's CIFAR-10 model. The options of a preset and of a YAML file are inserted
before the command-line arguments: one parser checks all three, and the command line wins.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from hf_ddpm.presets import Arguments, Given, choose_preset, fit_preset, preset_names, preset_path
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.options import (
    Auto,
    given_options,
    option,
    parse_first,
    parse_options,
    read_yaml,
    require,
    require_at_least,
    require_color,
    require_distinct,
    require_memory,
    require_range,
    require_types,
)

LARGEST_BETA = 0.999
# Length of a run with `--max_train_steps auto`: epochs, and the minimum and maximum number of steps.
AUTO_EPOCHS, AUTO_STEPS = 100, (10_000, 100_000)
# Values that `--dataset` accepts.
DATASETS = "digits; a folder of images, arrays, archives or parquet files; one such file; or a Hub id"


@dataclass
class ImageOptions:
    """Dataset options that training and evaluation share."""

    dataset: str | None = option(DATASETS, None)
    dataset_config: str | None = option("configuration of the dataset, if it has several", None)
    image_column: str | None = option("column of the images (default: guessed)", None)
    class_column: str | None = option(
        "class column, for class-conditional training; auto: detect it (default: unconditional)", None
    )
    enlarge: bool = option("upscale images that are smaller than the resolution instead of stopping", False)
    levels: int | None = option("number of evenly spaced pixel values (default: 17 for digits, else 256)", None)
    value_range: list[float] | None = option(
        "values of black and white in floating-point images", None, metavar="LOW HIGH"
    )
    background: str | None = option("color behind transparent pixels; unused with 4 channels (default: white)", None)
    skip_bad_images: bool = option("skip unusable images instead of stopping", False)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require(self, "levels", self.levels is None or 2 <= self.levels <= 65536, "2 to 65536")
        require_range(self, "value_range")
        require_color(self, "background")


@dataclass
class DataConfig(ImageOptions):
    """Data: the images to train on."""

    dataset: str = option(DATASETS, "")
    levels: int = option("number of evenly spaced pixel values; above 256 for 16-bit images", 256)
    background: str = option("color behind transparent pixels; unused with 4 channels", "white")
    split: str = option("split to train on", "train")
    class_dropout: float = option("probability of dropping the class of an image, for classifier-free guidance", 0.1)
    resolution: list[int] = option(
        "height and width in pixels, or one number for both; images are resized and cropped to this size",
        factory=lambda: [32],
    )
    crop: Literal["center", "random"] = option("where to crop images of another aspect ratio", "center")
    channels: int = option(
        "image channels: 1 (gray), 3 (RGB) or 4 (RGBA); any number with arrays (.npy, .npz, TIFF pages)", 3
    )
    horizontal_flip: bool = option("flip images horizontally with probability 0.5", False)
    max_train_samples: int | None = option("number of images to use, drawn at random (default: all)", None)
    streaming: bool = option("read and decode images on demand, for datasets larger than the disk", False)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        require(self, "dataset", bool(self.dataset), "a dataset, such as a folder of images, or --preset NAME")
        sides = self.resolution
        require(self, "resolution", len(sides) in (1, 2) and min(sides) >= 1, "one number or two, at least 1")
        require_at_least(self, 1, "channels", "max_train_samples")
        require(self, "class_dropout", 0 <= self.class_dropout < 1, "a value in [0, 1)")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.resolution[0], self.resolution[-1]


@dataclass
class ModelConfig:
    """Model: the U-Net."""

    init_from: str | None = option(
        "folder or Hub id of a DDPM pipeline to fine-tune; its network and noise schedule override the model and "
        "process options",
        None,
    )
    block_out_channels: list[int] = option("channels per resolution", factory=lambda: [128, 256, 256, 256])
    layers_per_block: int = option("residual blocks per resolution", 2)
    attention_resolutions: list[int] = option(
        "resolutions with self-attention, in addition to the middle block; 0 for none", factory=lambda: [16]
    )
    attention_head_dim: int | None = option("channels per attention head (default: one head)", None)
    norm_num_groups: int = option("number of groups in group normalization", 32)
    dropout: float = option("dropout probability", 0.1)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "norm_num_groups", "attention_head_dim", "layers_per_block")
        require(self, "dropout", 0 <= self.dropout < 1, "a value in [0, 1)")
        require(self, "block_out_channels", self.block_out_channels[0] >= 4, "at least 4 at the highest resolution")
        for width in self.block_out_channels:
            groups_fit = width >= 1 and width % self.norm_num_groups == 0
            require(self, "block_out_channels", groups_fit, f"multiples of --norm_num_groups {self.norm_num_groups}")


@dataclass
class DiffusionConfig:
    """Process: the noise schedule and the prediction of the network."""

    num_train_timesteps: int = option("number T of diffusion steps", 1000)
    beta_schedule: Literal["linear", "scaled_linear", "quad", "const", "squaredcos_cap_v2", "sigmoid"] = option(
        "schedule of the variances of the forward process", "linear"
    )
    beta_start: float | None = option("first variance (default: 0.1 / num_train_timesteps, at most 0.999)", None)
    beta_end: float | None = option("last variance (default: 20 / num_train_timesteps, at most 0.999)", None)
    allow_terminal_signal: bool = option(
        "train even if x_T keeps more than 0.1% of the variance of the images; samples then lack contrast", False
    )
    rescale_betas_zero_snr: bool = option("rescale the variances so that x_T is pure noise", False)
    prediction_type: Literal["epsilon", "sample", "mean", "v_prediction"] = option(
        "what the network predicts", "epsilon"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = option(
        "variance of the reverse steps", "fixed_large"
    )

    timestep_spacing: Literal["leading", "linspace", "trailing"] = option(
        "spacing of the timesteps when sampling in fewer steps", "trailing"
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require(self, "num_train_timesteps", self.num_train_timesteps >= 2, "at least 2")
        # The paper's values are for T = 1000. Scaling them by 1000 / T makes x_T pure noise for every T.
        if self.beta_start is None:
            self.beta_start = min(0.1 / self.num_train_timesteps, LARGEST_BETA)
        if self.beta_end is None:
            self.beta_end = min(20 / self.num_train_timesteps, LARGEST_BETA)
        require(self, "beta_start", 0 < self.beta_start < 1, "a value in (0, 1)")
        require(self, "beta_end", 0 < self.beta_end < 1, "a value in (0, 1)")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "--rescale_betas_zero_snr true with --prediction_type epsilon: x_T is pure noise, so its noise does "
                "not determine the image; expected --prediction_type v_prediction, sample or mean"
            )


@dataclass
class TrainingConfig:
    """Training: length, optimizer, precision, checkpoints, samples."""

    output_dir: str = option("folder of the run", "runs/ddpm")
    seed: int = option("random seed", 0)
    max_train_steps: int | None = option(
        f"optimizer steps; auto: {AUTO_EPOCHS} epochs, but at least {AUTO_STEPS[0]:,} and at most "
        f"{AUTO_STEPS[1]:,} steps (default: 800,000, like the paper)",
        None,
        auto=True,
    )
    num_train_epochs: int | None = option("number of epochs, instead of max_train_steps", None)
    train_batch_size: int = option(
        "batch size per process and forward pass; auto: the preset's batch size, split into the fewest accumulation "
        "steps that fit into memory",
        128,
        auto=True,
    )
    gradient_accumulation_steps: int = option("forward passes per optimizer step", 1)
    objective: Literal["simple", "vlb", "hybrid", "min_snr", "truncated_snr"] = option("training objective", "simple")
    learning_rate: float = option("learning rate of Adam after warm-up", 2e-4)
    lr_schedule: Literal["constant", "cosine", "linear", "polynomial"] = option(
        "learning rate schedule after warm-up; all but constant end at zero", "constant"
    )
    lr_power: float = option("exponent of the polynomial schedule; 1 is linear", 1.0)
    warmup_steps: int = option("steps in which the learning rate rises from zero", 5000)
    weight_decay: float = option("decoupled weight decay (AdamW); 0 is Adam", 0.0)
    adam_beta1: float = option("decay of Adam's first moment", 0.9)
    adam_beta2: float = option("decay of Adam's second moment", 0.999)
    max_grad_norm: float = option("maximum gradient norm; larger gradients are scaled down", 1.0)
    ema_decay: list[float] = option(
        "decays of the exponential moving averages of the weights; samples and the export use the first one, the "
        "others are exported to subfolders",
        factory=lambda: [0.9999],
    )
    ema_warmup: bool = option("start with smaller decays: min(decay, (1 + step) / (10 + step))", True)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] | None = option(
        "precision of the network's forward and backward passes; auto: bf16 if the device supports it and is faster "
        "with it, else no, which is float32 (default: as set by accelerate launch, else auto)",
        None,
    )
    tf32: bool = option("use TF32 on NVIDIA GPUs: factors of float32 products are rounded to 10 bits", True)
    deterministic: bool = option("use deterministic GPU kernels: slower, but runs repeat bit for bit", False)
    gradient_checkpointing: bool = option("recompute activations in the backward pass to save memory", False)
    check_memory: bool = option("stop before training if a step needs more memory than is free", True)
    compile: bool | None = option(
        "compile the network with torch.compile and check its gradients (default: as set by accelerate launch, else "
        "false)",
        None,
    )
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "experiment tracker, in addition to metrics.jsonl", "none"
    )
    world_size: int | None = option("required number of processes (default: any)", None)
    log_steps: int = option("steps between lines of metrics.jsonl", 50)
    checkpointing_steps: int = option("steps between checkpoints", 5000)
    keep_checkpoints: int = option("number of checkpoints to keep", 2)
    resume: str = option("checkpoint to resume from: latest, never, or its folder", "latest")
    sample_at_checkpoints: bool = option("write samples.png at every checkpoint, not only at the end", False)
    num_samples: int = option("images in samples.png; channels are side by side unless there are 1, 3 or 4", 64)
    num_inference_steps: int | None = option("sampling steps for samples.png (default: all)", None)
    dry_run: bool = option("print the estimated cost of the run and exit", False)

    def __post_init__(self) -> None:
        """Check the values; take missing ones from accelerate's launcher."""
        if self.mixed_precision is None:
            self.mixed_precision = launched("MIXED_PRECISION", ("no", "bf16", "fp16"), "auto")
        if self.compile is None:
            self.compile = launched("DYNAMO_BACKEND", ("no", "inductor"), "no") == "inductor"
        require_types(self)
        if self.max_train_steps is None and self.num_train_epochs is None:
            self.max_train_steps = 800_000
        if isinstance(self.max_train_steps, Auto):
            self.max_train_steps = Auto(AUTO_STEPS[0])  # replaced when the number of images is known
        either = None in (self.max_train_steps, self.num_train_epochs)
        length = "auto" if isinstance(self.max_train_steps, Auto) else self.max_train_steps
        require(
            self,
            "num_train_epochs",
            either,
            f"not supported with --max_train_steps {length}; expected only one of the two options",
        )
        counts = ("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps")
        kept = ("log_steps", "checkpointing_steps", "keep_checkpoints", "num_samples", "num_inference_steps")
        require_at_least(self, 1, *counts, *kept, "world_size")
        require_at_least(self, 0, "warmup_steps", "seed")
        for name in ("learning_rate", "lr_power", "max_grad_norm"):
            require(self, name, 0 < getattr(self, name) < float("inf"), "a value above 0")
        for name in ("output_dir", "resume"):
            require(self, name, bool(getattr(self, name)), "a path")
        require(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "a value in [0, 1)")
        decays = self.ema_decay
        require(self, "ema_decay", all(0 <= decay < 1 for decay in decays), "a value in [0, 1)")
        require_distinct(self, "ema_decay")

    def global_batch_size(self, processes: int) -> int:
        """Return the number of images per optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def counted(self, images: int, processes: int) -> "TrainingConfig":
        """Return a copy whose `num_train_epochs` or `max_train_steps="auto"`, if given, is converted to steps."""
        counted, size = copy.copy(self), self.global_batch_size(processes)
        if self.num_train_epochs is not None:
            counted.max_train_steps = math.ceil(self.num_train_epochs * images / size)
        elif isinstance(self.max_train_steps, Auto):
            fewest, most = AUTO_STEPS
            counted.max_train_steps = min(max(math.ceil(AUTO_EPOCHS * images / size), fewest), most)
        return counted


@dataclass
class EvaluationConfig:
    """Evaluation: metrics during training and at its end.

    The options have the names of the options of `hf-ddpm evaluate`, prefixed with `eval_`.
    """

    eval_metrics: str = option("metrics, separated by commas: fd, kid, is, pr, nll (default: none)", "")
    eval_steps: int | None = option(
        "steps between evaluations during training; best/ then holds the best model by the first metric", None
    )
    eval_split: str = option("held-out split, used by nll and --eval_floor", "test")
    eval_floor: bool = option("also evaluate the same number of held-out real images: the best value to expect", True)
    eval_extractor: str | None = option(
        "feature extractor: digits; inception, after pip install -c constraints.txt -e '.[inception]'; or a folder or "
        "Hub id of an image model (default: digits for dataset digits, else inception)",
        None,
    )
    eval_num_images: int | None = option("number of images to evaluate on (default: the whole held-out split)", None)
    eval_inference_steps: int | None = option("sampling steps (default: all)", None)
    eval_steps_per_image: int | None = option(
        "nll: number of timesteps evaluated per image, for an estimate (default: all)", None
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "eval_steps", "eval_num_images", "eval_inference_steps")
        require_at_least(self, 2, "eval_steps_per_image")
        ranks = self.eval_metrics.split(",")[0] in ("fd", "fid", "kid", "is")
        require(self, "eval_steps", self.eval_steps is None or ranks, "fd, kid or is first in --eval_metrics")


@dataclass
class DistillationConfig:
    """Distillation: a student whose step replaces two steps of its teacher; set by `hf-ddpm distill`."""

    teacher: str | None = option(
        "folder or Hub id of the DDPM pipeline to distill; the run starts from its weights", None
    )
    student_steps: int | None = option("sampling steps of the student", None)
    student_target: Literal["teacher", "images"] = option(
        "training target of the student: two steps of the teacher per step, or the images, to convert the teacher to "
        "another prediction type",
        "teacher",
    )
    teacher_guidance: float = option("guidance scale of the teacher, learned by the student; 1 for none", 1.0)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "student_steps")
        is_complete = (self.teacher is None) == (self.student_steps is None)
        require(self, "teacher", is_complete, "both --teacher and --student_steps, or neither")
        is_guided = self.teacher_guidance != 1
        require(self, "teacher_guidance", math.isfinite(self.teacher_guidance), "a finite number")
        require(self, "teacher_guidance", not (is_guided and self.teacher is None), "1 without --teacher")


@dataclass
class HubConfig:
    """Hub: the repository of the model and its license."""

    push_to_hub: bool = option("push the model at every checkpoint (in the background) and at the end", False)
    hub_model_id: str | None = option("repository, as namespace/name; created if missing", None)
    hub_private_repo: bool | None = option(
        "make a new repository private; error if an existing one is public (default: the account's setting)", None
    )
    license: str | None = option("license of the model, for its card, such as apache-2.0", None)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        name = self.hub_model_id
        require(self, "hub_model_id", name is None or name.count("/") == 1, "namespace/name")
        require(
            self,
            "push_to_hub",
            not self.push_to_hub or name is not None,
            "--hub_model_id NAMESPACE/NAME is missing; expected a repository to push to",
        )


# Both set the length of a run: the one given last wins.
LENGTHS = {"max_train_steps", "num_train_epochs"}

# Options that accelerate's launcher sets, by their name there.
LAUNCHED = {"MIXED_PRECISION": "mixed_precision", "DYNAMO_BACKEND": "compile"}


def launched(name: str, allowed: tuple[str, ...], default: str) -> Any:
    """Return a setting of accelerate's launcher, or a default; raise a `ValueError` if the setting is not supported."""
    value = os.environ.get(f"ACCELERATE_{name}", default).lower()
    if value not in (*allowed, default):
        option, expected = LAUNCHED[name], ", ".join(allowed)
        raise ValueError(f"{name.lower()}={value!r} of the launcher: not supported; expected {expected}, or --{option}")
    return value


# Options that do not affect the weights of a run.
NOT_ABOUT_WEIGHTS = {field.name for part in (EvaluationConfig, HubConfig) for field in dataclasses.fields(part)}

# Former defaults of options whose default has changed. A run keeps the defaults of the version that started it.
FORMER_DEFAULTS: dict[str, Any] = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "ema_warmup": False,
    "mixed_precision": "no",
    "timestep_spacing": "leading",
}

# Parts that describe a dataset, not a model; a preset's values are for its own dataset only.
OF_DATA = (DataConfig, EvaluationConfig, HubConfig)

PARTS = (
    *(DataConfig, ModelConfig, DiffusionConfig, TrainingConfig, EvaluationConfig, HubConfig),
    DistillationConfig,
)


@dataclass
class Config:
    """All options of a training run.

    Attributes:
        defaulted: Values of options that were not given: the values of `FORMER_DEFAULTS` and of an automatic preset.
        notes: Lines that report the choice of a preset.
    """

    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    hub: HubConfig
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    defaulted: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    notes: list[str] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, **options: Any) -> "Config":
        """Create a config from options by their command-line names.

        Args:
            options: Values by option name; None stands for the default.

        Returns:
            The config.

        Raises:
            ValueError: If an option is unknown or its value is invalid; the message is one line.

        Example:
            >>> Config.of(preset="digits", resolution=[8, 16], num_train_epochs=3).data.size
            (8, 16)
        """
        if "help" in options:
            raise ValueError("unknown option help: hf-ddpm train --help lists the options")
        return parse_config(arguments_of(options))

    def __post_init__(self) -> None:
        """Check options of different parts against each other."""
        pixels = float(self.data.channels * math.prod(self.data.size))
        require_memory(self.data, "resolution", 4 * pixels)
        require_memory(self.training, "train_batch_size", 4 * pixels * self.training.train_batch_size)
        require_memory(self.training, "num_samples", 4 * pixels * self.training.num_samples)
        if self.start_from is None:
            self._check_architecture()
        self._check_distillation()
        if self.data.streaming and self.evaluation.eval_metrics:
            raise ValueError(
                f"--eval_metrics {self.evaluation.eval_metrics}: not supported with --streaming true; evaluate after "
                "training with hf-ddpm evaluate"
            )
        between, every = self.training.checkpointing_steps, self.evaluation.eval_steps
        # A checkpoint before each evaluation: a kill during the evaluation loses no steps.
        fits = (every or 0) % between == 0
        require(self.evaluation, "eval_steps", fits, f"a multiple of --checkpointing_steps {between}")

    def _check_distillation(self) -> None:
        if self.distillation.teacher is None:
            return
        require(self.model, "init_from", self.model.init_from is None, "only one of --init_from and --teacher")
        predicts = self.diffusion.prediction_type in ("v_prediction", "sample")
        require(self.diffusion, "prediction_type", predicts, "v_prediction or sample for a student")
        metrics = self.evaluation.eval_metrics
        has_nll = "nll" in metrics.split(",")
        require(
            self.evaluation,
            "eval_metrics",
            not has_nll,
            "nll is not supported for a distilled model, which has no variational bound; expected other metrics",
        )

    @property
    def start_from(self) -> str | None:
        """The pipeline whose weights and process the run starts from; None to train from scratch."""
        return self.model.init_from or self.distillation.teacher

    def _check_architecture(self) -> None:
        multiple = 2 ** (len(self.model.block_out_channels) - 1)
        fits = all(side % multiple == 0 for side in self.data.size)
        example = " ".join(str(max(1, round(side / multiple)) * multiple) for side in self.data.resolution)
        require(self.data, "resolution", fits, f"the U-Net with {len(self.model.block_out_channels)} resolutions needs "
                f"multiples of {multiple}; expected for example {example}")  # fmt: skip
        reached, channels = self.resolutions, self.model.block_out_channels
        is_reached = all(size in (0, *reached) for size in self.model.attention_resolutions)
        require(self.model, "attention_resolutions", is_reached, f"any of {reached}, or 0 for none")
        attended = [width for width, attends in zip(channels, self.attends, strict=True) if attends]
        narrowest = min([*attended, channels[-1]])  # the middle block also has attention
        head_dim = self.model.attention_head_dim or 1
        require(
            self.model,
            "attention_head_dim",
            head_dim <= narrowest,
            f"at most {narrowest}, the channels of the narrowest block with attention",
        )

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the U-Net (of the shorter side), from the highest down."""
        return [min(self.data.size) // 2**i for i in range(len(self.model.block_out_channels))]

    @property
    def attends(self) -> list[bool]:
        """For each of `resolutions`, True if it has self-attention."""
        return [resolution in self.model.attention_resolutions for resolution in self.resolutions]

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self)[: len(PARTS)])
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def save(self, path: Path) -> None:
        """Write all options as a YAML file for `--config`."""
        counted = {} if self.training.num_train_epochs is None else {"max_train_steps": None}
        write_text(path, yaml.safe_dump(self.to_dict() | counted, sort_keys=False))

    def resumed(self, stored: Mapping[str, Any]) -> "Config":
        """Return the options to resume a stored run with: options that were not given keep their stored value."""
        past, now = with_past_defaults(stored), self.to_dict()
        kept = {name: past[name] for name, value in self.defaulted.items() if now[name] == value}
        if now["mixed_precision"] == "auto":
            kept["mixed_precision"] = past["mixed_precision"]
        if past["block_out_channels"] == now["block_out_channels"]:  # otherwise the run predates automatic presets
            kept = {name: value for name, value in kept.items() if name not in LENGTHS}
        parts = {}
        for entry in dataclasses.fields(self)[: len(PARTS)]:
            part = getattr(self, entry.name)
            changed = {name: value for name, value in kept.items() if hasattr(part, name)}
            parts |= {entry.name: dataclasses.replace(part, **changed)} if changed else {}
        return dataclasses.replace(self, **parts)

    def num_class_embeds(self, classes: int) -> int | None:
        """Return the number of class embeddings, with one for "no class" if `class_dropout` is positive."""
        return classes + (self.data.class_dropout > 0) if classes else None

    def unet(self, classes: int = 0) -> dict[str, Any]:
        """Return the options of the `UNet2DModel`; the fixed ones have the values of the paper's code."""
        height, width = self.data.size
        return {
            "sample_size": height if height == width else (height, width),
            "in_channels": self.data.channels,
            "out_channels": self.data.channels * (2 if self.diffusion.variance_type.startswith("learned") else 1),
            "block_out_channels": tuple(self.model.block_out_channels),
            **block_types(self.attends),
            "layers_per_block": self.model.layers_per_block,
            "attention_head_dim": self.model.attention_head_dim,
            "norm_num_groups": self.model.norm_num_groups,
            "dropout": self.model.dropout,
            "num_class_embeds": self.num_class_embeds(classes),
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        }

    def scheduler(self) -> dict[str, Any]:
        """Return the options of the `DDPMScheduler`."""
        options = dataclasses.asdict(self.diffusion)
        del options["allow_terminal_signal"]
        return options


def block_types(attends: list[bool]) -> dict[str, tuple[str, ...]]:
    """Return the block types of a `UNet2DModel` with attention at some resolutions, from the highest down."""
    return {
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    }


@dataclass
class Sources:
    """Sources: a preset and a file of options; the command line overrides both."""

    preset: str | None = option(
        f"one of {', '.join(preset_names())} (see `hf-ddpm presets`) (default: a small one, "
        "unless block_out_channels is given)",
        None,
    )
    config: str | None = option("YAML file of options, such as the config.yaml of a run", None)


def default_options(parts: Iterable[type] = PARTS) -> dict[str, Any]:
    """Return the defaults of the options of some parts, by name."""
    fields = [field for part in parts for field in dataclasses.fields(part)]
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }


def option_types() -> dict[str, Any]:
    """Return the type annotations of all options, by name."""
    return {name: hint for part in PARTS for name, hint in get_type_hints(part).items()}


def with_past_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored options; options that are missing there get the default of that time."""
    return {**default_options(), **FORMER_DEFAULTS, **stored}


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as command-line arguments; options set to None are omitted."""
    argv = []
    for name, value in options.items():
        if isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def parse_config(argv: list[str], doc: str | None = None) -> Config:
    """Parse `[--preset NAME] [--config FILE.yaml] [--OPTION VALUE ...]`; later values win.

    Args:
        argv: The command line without the program's name.
        doc: Text that `--help` prints around the options.

    Returns:
        The config.

    Raises:
        ValueError: If an option is unknown or its value is invalid; the message is one line.
    """
    sources, _ = parse_first(argv, Sources)
    file = {} if sources.config is None else read_yaml(Path(sources.config), PARTS)
    if sources.preset is None:  # null in a file resets options of a given preset, not of an automatic one
        file = {name: value for name, value in file.items() if value is not None}
    preset, chosen, notes = _preset(sources.preset, file, argv)
    options = _merged(_merged(preset, file), dict.fromkeys(LENGTHS & given_options(argv, PARTS)))
    arguments = _command_line(options)
    _, *parts = parse_options(arguments + argv, Sources, *PARTS, doc=doc)
    config = Config(*parts)
    given = {*file, *given_options(argv, PARTS)}
    chosen |= {"gradient_accumulation_steps"} if "train_batch_size" in chosen else set()  # they change together
    chosen -= given | LENGTHS if given & LENGTHS else given
    chosen |= FORMER_DEFAULTS.keys() - given_options(arguments + argv, PARTS)
    config.defaulted = {name: value for name, value in config.to_dict().items() if name in chosen}
    config.notes = [line for line in notes if line]
    return config


def _preset(name: str | None, file: Arguments, argv: list[str]) -> tuple[Arguments, set[str], list[str]]:
    """Return the options of the given or automatic preset, the names of automatic options, and lines on the choice."""
    names = {entry.name for entry in dataclasses.fields(Given)}
    given, _ = parse_first(_command_line({key: value for key, value in file.items() if key in names}) + argv, Given)
    choice, line = (name, "") if name else choose_preset(given)
    if choice is None:
        return {}, set(), []
    preset = read_yaml(preset_path(choice), PARTS)
    fitted, unused = fit_preset(choice, preset, given, default_options(OF_DATA))
    chosen = {key for key, value in preset.items() if name is None or fitted.get(key) != value}
    return fitted, chosen, [line, unused]


def _command_line(options: Arguments) -> list[str]:
    """Return options as command-line arguments."""
    return [word for name, value in options.items() if value is not None for word in _as_arguments(name, value)]


def _as_arguments(name: str, values: list[str]) -> list[str]:
    """Return an option as command-line arguments; `=` marks a value that starts with `-` as a value."""
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _merged(earlier: Arguments, later: Arguments) -> Arguments:
    """Merge options of two sources; a run length in the later source replaces any in the earlier one."""
    replaced = LENGTHS if LENGTHS & later.keys() else set()
    kept = {name: value for name, value in earlier.items() if name not in replaced}
    batch = kept.get("train_batch_size")
    if batch is not None and later.get("train_batch_size") == ["auto"]:
        later = later | {"train_batch_size": [*batch, "--train_batch_size=auto"]}  # auto divides the earlier value
    return kept | later
