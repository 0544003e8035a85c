"""Makes the figures and the tables of the paper from a model, each as JSON, PNG and Markdown.

    python scripts/reproduce.py all --model runs/digits --output figures
    python scripts/reproduce.py interpolate --model org/name --first a.png --second b.png --diffused 500
    accelerate launch scripts/reproduce.py steps --model org/name --dataset uoft-cs/cifar10 --num_images 10000

`--help` lists the figures, `FIGURE --help` their options. The same command goes on after an interruption: images that
were sampled stay below `samples/` in the output.
"""

import torch
from accelerate import Accelerator

from hf_ddpm.launch import run_script, use_own_cores
from hf_ddpm.options import parse_command
from hf_ddpm.paper.everything import FIGURES, AllConfig, everything
from hf_ddpm.paper.study import Study, Subject

COMMANDS = {**FIGURES, "all": (everything, AllConfig)}


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    name, (subject, options) = parse_command(argv, {name: (Subject, config) for name, (_, config) in COMMANDS.items()})
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    study = Study(subject, accelerator)
    make, _ = COMMANDS[name]
    make(study, options)
    report = study.folder / f"{'report' if name == 'all' else name}.md"
    accelerator.print(report.read_text() if name != "all" else f"{report} holds all figures")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
