"""Distill a DDPM into one that samples in few steps (progressive distillation, Salimans & Ho 2022).

    hf-ddpm distill --model runs/digits --steps 4 --output runs/digits-4
    hf-ddpm distill --model org/name --dataset my_folder --steps 8 --max_train_steps 20000 --output runs/mine-8
    accelerate launch -m hf_ddpm distill --model runs/classes --guidance_scale 2 --steps 4 --output runs/classes-4

Each stage is a training run in a folder of its own: 128-steps/ teaches a model that predicts the noise to predict v, on
the images; 64-steps/, 32-steps/, ... each halve the steps of the stage before. The same command resumes. Options of
hf-ddpm train are those of each stage. By default data, batch size and learning rate are those of the run of the model;
the first stage is as long as that, at most 100,000 steps, and each halving half as long.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_ddpm.config import DataConfig, EvaluationConfig, TrainingConfig
from hf_ddpm.utils.launch import Interrupted
from hf_ddpm.utils.options import option, parse_first, parse_options, require, require_at_least, require_types


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


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    if {"-h", "--help"} & set(argv):
        parse_options(argv, DistillConfig, DataConfig, TrainingConfig, EvaluationConfig, doc=__doc__)
    options, words = parse_first(argv, DistillConfig)
    from hf_ddpm.cli.stages import run_stages  # takes seconds

    try:
        run_stages(options, words)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
