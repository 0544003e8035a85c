"""Distill a DDPM into one that samples in few steps (progressive distillation, Salimans & Ho 2022).

    hf-ddpm distill --model runs/digits --steps 4 --output runs/digits-4
    hf-ddpm distill --model org/name --dataset my_folder --steps 8 --max_train_steps 20000 --output runs/mine-8
    accelerate launch -m hf_ddpm distill --model runs/classes --guidance_scale 2 --steps 4 --output runs/classes-4

Each stage is a training run in its own folder: 128-steps/ trains a model that predicts the noise to predict v instead,
on the images; 64-steps/, 32-steps/, ... each halve the number of steps. The same command resumes. Options of hf-ddpm
train apply to each stage. By default, the data, batch size and learning rate come from the model's own run; the
first stage trains for twice the steps of that run (or of 100,000), and each halving for a quarter of them.
"""

import re
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

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

# Options of a training run that a distillation sets itself, with the reason.
FIXED_OPTIONS = {
    **{field.name: "the model sets it" for part in (ModelConfig, DiffusionConfig) for field in fields(part)},
    **{field.name: "each stage sets it" for field in fields(DistillationConfig)},
    **{"output_dir": "use --output", "push_to_hub": "use hf-ddpm push after the distillation"},
    **{field.name: "the options of the model's own run are the defaults" for field in fields(Sources)},
}


@dataclass
class DistillConfig:
    """Distillation: the model, its new number of steps, the images."""

    model: str = option("folder or Hub id of the DDPM pipeline (hf_ddpm or diffusers) to distill")
    steps: int = option("sampling steps of the distilled model; a divisor of the model's number of diffusion steps")
    output: str = option("folder of the distilled model; its stages are in subfolders")
    start_steps: int | None = option(
        "sampling steps after the first halving: --steps times a power of two (default: the largest such number up to "
        "64)",
        None,
    )
    prediction_type: Literal["v_prediction", "sample"] = option("what the distilled model predicts", "v_prediction")
    convert: bool | None = option(
        "start with a stage that trains the new prediction type on the images (default: true for models that "
        "predict the noise or the mean)",
        None,
    )
    guidance_scale: float = option("scale of classifier-free guidance to distill into the model; 1 for none", 1.0)
    data_free: bool = option("train on samples of the model instead of a dataset", False)
    free_images: int = option("number of samples to train on with --data_free", 4096)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        require_at_least(self, 1, "steps", "start_steps", "free_images")
        require(self, "output", not Path(self.output).is_file(), "a folder, not a file")


def parse_distill(argv: list[str], doc: str | None = None) -> tuple[DistillConfig, list[str]]:
    """Parse the options of a distillation; also return the remaining arguments, which are options of its training runs.

    Raises:
        ValueError: If an option is unknown or its value is invalid; the message is one line.
    """
    if {"-h", "--help"} & set(argv):
        shown = [_without_defaults(part) for part in (DataConfig, TrainingConfig, EvaluationConfig)]
        parse_options(argv, DistillConfig, *shown, doc=doc)
    options, arguments = parse_first(argv, DistillConfig)
    check_arguments(arguments)
    return options, arguments


def _without_defaults(part: type) -> type:
    """Return a part for `--help`, without fixed options, and without defaults, as the model's run has others."""
    hints, entries = get_type_hints(part), []
    for entry in fields(part):
        if entry.name not in FIXED_OPTIONS:
            text = re.sub(r" \(default: .*\)$", "", entry.metadata["help"])
            settings = {key: value for key, value in entry.metadata.items() if key != "help"}
            entries.append((entry.name, hints[entry.name], option(text, None, **settings)))
    return make_dataclass(part.__name__, entries, namespace={"__doc__": part.__doc__})


def check_arguments(arguments: list[str]) -> None:
    """Raise a `ValueError` if an option of a stage is unknown, set by the distillation, or invalid."""
    for name in sorted(given_options(arguments, (*PARTS, Sources)) & FIXED_OPTIONS.keys() - {"dropout"}):
        raise ValueError(f"--{name}: not an option of distill; {FIXED_OPTIONS[name]}")
    parse_options(["--dataset=dataset_of_the_run", *arguments], *PARTS)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    options, arguments = parse_distill(argv, doc=__doc__)
    from hf_ddpm.cli.stages import run_stages  # slow import

    try:
        run_stages(options, arguments)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
