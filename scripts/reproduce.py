"""Makes the figures and the tables of the paper from a model, each as JSON, PNG and Markdown.

    python scripts/reproduce.py steps --model runs/digits --output figures
    accelerate launch scripts/reproduce.py steps --model org/name --dataset uoft-cs/cifar10 --num_images 10000

The same command goes on after an interruption: images that were sampled stay in the folder `samples` of the output.
"""

import torch
from accelerate import Accelerator

from hf_ddpm.launch import run_script, use_own_cores
from hf_ddpm.options import parse_command
from hf_ddpm.paper.interpolation import InterpolateConfig, interpolate
from hf_ddpm.paper.progressive import ProgressiveConfig, progressive
from hf_ddpm.paper.shared_latent import SharedLatentConfig, shared_latent
from hf_ddpm.paper.steps import StepsConfig, steps
from hf_ddpm.paper.study import Study, Subject

COMMANDS = {
    "progressive": (progressive, ProgressiveConfig),
    "interpolate": (interpolate, InterpolateConfig),
    "shared-latent": (shared_latent, SharedLatentConfig),
    "steps": (steps, StepsConfig),
}


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    name, (subject, options) = parse_command(argv, {name: (Subject, part) for name, (_, part) in COMMANDS.items()})
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    study = Study(subject, accelerator)
    COMMANDS[name][0](study, options)
    accelerator.print((study.folder / f"{name}.md").read_text())
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
