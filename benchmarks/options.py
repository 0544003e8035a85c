"""Options of the benchmark."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.config import PARTS, Config, EvaluationConfig, Sources, parse_config
from hf_ddpm.utils.options import given_options, option, parse_first, parse_options, require, require_at_least

# The values of --tasks, and the tasks of each.
TASKS = {
    "forward": ("forward",),
    "train_step": ("train_step",),
    "training": ("training",),
    "sampling": ("sampling", "sampling_1"),
    "data": ("data_memory", "data_jpeg"),
    "import": ("import_time", "load_time"),
    "nll": ("nll",),
}

OTHERS = ("diffusers", "denoising-diffusion-pytorch")

# Tasks that can run on several processes: their turns have the same number of steps on all processes.
STEPS = ("train_step", "training")


@dataclass
class BenchmarkConfig:
    """Tasks and contenders; the options of train.py set network, data, batch and precision."""

    json: str = option("JSON file for the results; a table is written next to it as .md", "benchmark.json")
    device: Literal["auto", "cuda", "cpu"] = option("device; auto: a GPU if available, else the CPU", "auto")
    against: str = option(f"contenders: any of {', '.join(OTHERS)}, comma-separated; or none", ",".join(OTHERS))
    tasks: str = option(f"any of {', '.join(TASKS)}, comma-separated", ",".join(TASKS))
    rounds: int = option("timed turns per contender, after a warm-up turn", 5)
    steps_per_turn: int = option("training steps per turn of train_step and training", 10)
    threads: int | None = option("threads of this process (default: torch's choice)", None)
    memory: bool = option("also measure peak memory", True)
    check: bool = option(
        "before timing, compare outputs with diffusers' in float32, and half-precision or compiled outputs with "
        "float32; with --compile and dropout, diffusers is compiled once more",
        True,
    )
    others_precision: Literal["same", "no", "bf16", "fp16"] = option(
        "precision of the other packages; hf_ddpm runs in --mixed_precision", "same"
    )
    profile: str | None = option(
        "write a Chrome trace of a step, pass or short chain of each of our tasks: FILE.json or FILE.json.gz becomes "
        "FILE_TASK.json...; the report lists the slowest kernels",
        None,
    )
    growth: Literal["none", "batch", "resolution", "steps", "processes"] = option(
        "repeat the tasks for several values of this setting, and plot a curve per task", "none"
    )
    growth_values: list[int] = option(
        "values of --growth (default: 1 to 64 images, 1 to 4 times the resolution, 10 to 1000 steps, 1 and 2 "
        "processes)",
        factory=list,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "rounds", "steps_per_turn", "threads")
        for name, known in (("against", (*OTHERS, "none")), ("tasks", tuple(TASKS))):
            chosen = _names(getattr(self, name))
            require(self, name, set(chosen) <= set(known), f"any of {', '.join(known)}")
            require(self, name, len(set(chosen)) == len(chosen), "each name only once")
        require(self, "tasks", bool(_names(self.tasks)), f"any of {', '.join(TASKS)}")
        in_step = self.growth != "processes" or set(self.chosen) <= set(STEPS)
        require(self, "tasks", in_step, f"{' or '.join(STEPS)} with --growth processes")
        require(self, "growth_values", all(value >= 1 for value in self.growth_values), "at least 1")
        if self.device == "cuda":
            import torch  # takes seconds

            require(self, "device", torch.cuda.is_available(), "torch finds no GPU; expected cpu")
        require(self, "json", self.json.endswith(".json") and not Path(self.json).is_dir(), "a file that ends in .json")
        traced = self.profile is None or self.profile.endswith((".json", ".json.gz"))
        require(self, "profile", traced, "a file that ends in .json or .json.gz")
        require(
            self,
            "profile",
            self.profile is None or self.growth == "none",
            "not supported with --growth; expected only one of them",
        )

    @property
    def chosen(self) -> list[str]:
        """The tasks that are timed."""
        return [task for name in _names(self.tasks) for task in TASKS[name]]

    @property
    def others(self) -> list[str]:
        """The other contenders."""
        return [] if self.against == "none" else _names(self.against)


def parse_benchmark(argv: list[str], doc: str | None = None) -> tuple[BenchmarkConfig, Config]:
    """Parse the options of `BenchmarkConfig` and of a run; the default preset is digits, and `--help` prints `doc`.

    Raises:
        ValueError: If an option is unknown or its value is invalid; one line.
    """
    if {"-h", "--help"} & set(argv):
        parse_options(argv, BenchmarkConfig, Sources, *PARTS, doc=doc)
    options, rest = parse_first(argv, BenchmarkConfig)
    if not {"--preset", "--config", "--dataset"} & {word.split("=")[0] for word in rest}:
        rest = ["--preset", "digits", *rest]
    return options, _comparable(parse_config(rest), given_options(rest, PARTS))


def grown(config: Config, over: str, value: int) -> Config:
    """Return the options of a run with `value` as batch size, resolution or number of diffusion steps."""
    data, model, training = config.data, config.model, config.training
    if over == "batch":
        return replace(config, training=replace(training, train_batch_size=value))
    if over == "steps":
        diffusion = replace(config.diffusion, num_train_timesteps=value)
        return replace(config, diffusion=diffusion, training=replace(training, num_inference_steps=None))
    if over == "resolution":
        # Attention stays at the same depth of the network.
        shorter, height, width = min(data.size), *data.size
        attended = [size * value // shorter for size in model.attention_resolutions]
        size = [height * value // shorter, width * value // shorter]
        return replace(
            config, data=replace(data, resolution=size), model=replace(model, attention_resolutions=attended)
        )
    return config


def growth_values(options: BenchmarkConfig, config: Config) -> list[int]:
    """Return the values of `--growth`, [0] without it."""
    if options.growth == "none":
        return [0]
    shorter = min(config.data.size)
    usual = {
        "batch": [1, 4, 16, 64],
        "resolution": [shorter, 2 * shorter, 4 * shorter],
        "steps": [10, 100, 1000],
        "processes": [1, 2],
    }
    return options.growth_values or usual[options.growth]


# With this variance and fewer than all steps, diffusers adds noise in the last step unless that step is at t = 0.
_SPACING = {"fixed_large": {"timestep_spacing": "leading"}}


def _comparable(config: Config, given: set[str]) -> Config:
    """Return the options restricted to features of all contenders; precision is float32 unless it is given."""
    require(config.data, "channels", config.data.channels in (1, 3, 4), "1, 3 or 4, which all contenders read")
    shared: dict[str, Any] = {"gradient_accumulation_steps": 1, "tracker": "none", "num_samples": 1}
    if config.training.mixed_precision == "auto" and "mixed_precision" not in given:
        shared["mixed_precision"] = "no"
    return replace(
        config,
        data=replace(config.data, class_column=None, streaming=False),
        diffusion=replace(config.diffusion, **_SPACING.get(config.diffusion.variance_type, {})),
        training=replace(config.training, **shared),
        evaluation=EvaluationConfig(),
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
