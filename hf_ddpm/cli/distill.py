"""Distill a DDPM into one that samples in few steps (progressive distillation, Salimans & Ho 2022).

    hf-ddpm distill --model runs/digits --steps 4 --output runs/digits-4
    hf-ddpm distill --model org/name --dataset my_folder --steps 8 --max_train_steps 20000 --output runs/mine-8
    accelerate launch -m hf_ddpm distill --model runs/classes --guidance_scale 2 --steps 4 --output runs/classes-4

Each stage is a training run in a folder of its own: 128-steps/ teaches a model that predicts the noise to predict v, on
the images; 64-steps/, 32-steps/, ... each halve the steps of the stage before. The same command resumes. Options of
hf-ddpm train are those of each stage. By default data, batch size and learning rate are those of the run of the model;
the first stage is twice as long as that (or as 100,000 steps), and each halving a quarter as long.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from hf_ddpm.config import (
    PARTS,
    DataConfig,
    DiffusionConfig,
    DistillationConfig,
    EvaluationConfig,
    ModelConfig,
    Sources,
    TrainingConfig,
)
from hf_ddpm.utils.launch import Interrupted
from hf_ddpm.utils.options import (
    given_options,
    option,
    parse_first,
    parse_options,
    require,
    require_at_least,
    require_types,
)

# Options of a training run that a distillation decides itself, with the reason.
DECIDED = {
    **{field.name: "that of the model" for part in (ModelConfig, DiffusionConfig) for field in fields(part)},
    **{field.name: "that of the stage" for field in fields(DistillationConfig)},
    **{"output_dir": "--output is the folder", "push_to_hub": "hf-ddpm push does it afterwards"},
    **{field.name: "the options of the run of the model hold" for field in fields(Sources)},
}


@dataclass
class DistillConfig:
    """Distillation: which model, to how many steps, from what images."""

    model: str = option("folder or Hub id of the DDPM pipeline to distill, of hf_ddpm or of diffusers")
    steps: int = option("steps that the distilled model samples in; a divisor of the model's number of diffusion steps")
    output: str = option("folder of the distilled model; its stages are below it")
    start_steps: int | None = option(
        "steps of the first stage, --steps times a power of two; by default the largest up to 64", None
    )
    prediction_type: Literal["v_prediction", "sample"] = option("what the distilled model predicts", "v_prediction")
    convert: bool | None = option(
        "begin with a stage that learns the new prediction from the images; by default for models that predict the "
        "noise or the mean",
        None,
    )
    guidance_scale: float = option("strength of classifier-free guidance that is distilled in; 1 for none", 1.0)
    data_free: bool = option("train on samples of the model instead of a data set", False)
    free_images: int = option("number of those samples", 4096)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "steps", "start_steps", "free_images")
        require(self, "output", not Path(self.output).is_file(), "it is a file, a folder is wanted")


def parse_distill(argv: list[str], doc: str | None = None) -> tuple[DistillConfig, list[str]]:
    """Read the options of a distillation, and return the words that are options of its training runs.

    Raises:
        ValueError: If an option is unknown or its value not allowed; one line.
    """
    if {"-h", "--help"} & set(argv):
        parse_options(argv, DistillConfig, DataConfig, TrainingConfig, EvaluationConfig, doc=doc)
    options, words = parse_first(argv, DistillConfig)
    check_words(words)
    return options, words


def check_words(words: list[str]) -> None:
    """Raise a `ValueError` if an option of a stage is unknown, decided by the distillation, or not allowed."""
    for name in sorted(given_options(words, (*PARTS, Sources)) & DECIDED.keys() - {"dropout"}):
        raise ValueError(f"--{name} is not an option of distill: {DECIDED[name]}")
    parse_options(["--dataset=that_of_the_run", *words], *PARTS)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    options, words = parse_distill(argv, doc=__doc__)
    from hf_ddpm.cli.stages import run_stages  # takes seconds

    try:
        run_stages(options, words)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
