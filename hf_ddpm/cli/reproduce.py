"""Makes the figures and the tables of the paper from a model, each as JSON, PNG and Markdown.

    python scripts/reproduce.py all --model runs/digits --output figures
    python scripts/reproduce.py interpolate --model org/name --first a.png --second b.png --diffused 500
    accelerate launch scripts/reproduce.py steps --model org/name --dataset uoft-cs/cifar10 --num_images 10000
    python scripts/reproduce.py ablation --preset digits --output figures

`--help` lists the figures, `FIGURE --help` their options. The same command goes on after an interruption: images that
were sampled stay below `samples/` in the output, runs of the ablation below `ablation/`.
"""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_ddpm.paper import figure
from hf_ddpm.paper.ablation import ablation
from hf_ddpm.paper.context import FigureContext
from hf_ddpm.paper.options import FIGURES, AblationOptions, AllOptions, FigureOptions
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import parse_command


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    commands = {name: (FigureOptions, options) for name, options in {**FIGURES, "all": AllOptions}.items()}
    name, parts = parse_command(argv, {**commands, "ablation": (AblationOptions,)})
    if name == "ablation":
        ablation(parts[0], lambda script, words: run(parts[0].launcher, script, words))
        print((Path(parts[0].output) / "ablation.md").read_text(encoding="utf-8"))
        return 0
    shared, options = parts
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    context = FigureContext(shared, accelerator, log=cache(accelerator.print))  # once, not per figure
    figure(name)(context, options)
    if accelerator.is_main_process:  # which alone knows that the report is written
        report = context.folder / f"{name}.md"
        print(f"{context.folder / 'report.md'} shows all" if name == "all" else report.read_text(encoding="utf-8"))
    accelerator.end_training()
    return 0


def run(launcher: str, script: str, words: list[str]) -> int:
    """Runs another script, which is told to save if this is interrupted; returns its exit code."""
    command = [*(shlex.split(launcher) or [sys.executable]), "-m", "hf_ddpm", script, *words]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise
