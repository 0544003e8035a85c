"""Reproduce the figures and tables of the paper with a model, as JSON, PNG and Markdown.

    hf-ddpm reproduce all --model runs/digits --output figures
    hf-ddpm reproduce interpolate --model org/name --first a.png --second b.png --diffused 500
    accelerate launch -m hf_ddpm reproduce steps --model org/name --dataset uoft-cs/cifar10 --num_images 10000
    hf-ddpm reproduce ablation --preset digits --output figures
    hf-ddpm reproduce distillation --model runs/digits --distilled runs/digits-4 --num_images 899

The same command resumes after an interruption: samples are kept in the subfolder samples/ of the output, and the runs
of the ablation in ablation/.
"""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

from hf_ddpm.paper import figure
from hf_ddpm.paper.options import FIGURES, AblationOptions, AllOptions, DistillationOptions, FigureOptions
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import parse_command

COMMANDS: dict[str, tuple[type, ...]] = {
    **{name: (FigureOptions, options) for name, options in FIGURES.items()},
    "distillation": (FigureOptions, DistillationOptions),
    "all": (FigureOptions, AllOptions),
    "ablation": (AblationOptions,),
}


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    name, parts = parse_command(argv, COMMANDS, doc=__doc__)
    if name == "ablation":
        from hf_ddpm.paper.ablation import ablation  # slow import

        ablation(parts[0], lambda command, arguments: run(parts[0].launcher, command, arguments))
        print((Path(parts[0].output) / "ablation.md").read_text(encoding="utf-8"))
        return 0
    import torch  # slow imports
    from accelerate import Accelerator

    from hf_ddpm.paper.context import FigureContext

    shared, options = parts
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    context = FigureContext(shared, accelerator, log=cache(accelerator.print))  # print each line once, not per figure
    figure(name)(context, options)
    if accelerator.is_main_process:  # other processes do not wait for the report
        report = context.folder / f"{name}.md"
        all_reports = f"report of all figures: {context.folder / 'report.md'}"
        print(all_reports if name == "all" else report.read_text(encoding="utf-8"))
    accelerator.end_training()
    return 0


def run(launcher: str, command: str, arguments: list[str]) -> int:
    """Run another command and return its exit code; on an interruption, end it with a signal so that it can save."""
    line = [*(shlex.split(launcher) or [sys.executable]), "-m", "hf_ddpm", command, *arguments]
    with subprocess.Popen(line) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise
