"""Times this package beside diffusers and denoising-diffusion-pytorch: the same work, in turns, in one process.

    python scripts/benchmark.py --preset digits --threads 1 --json digits.json
    python scripts/benchmark.py --preset cifar10 --mixed_precision bf16 --tasks forward,train_step --json cifar10.json
    python scripts/benchmark.py --tasks sampling --growth steps --json steps.json

Tasks: `forward`, the network without gradients; `train_step`, a step of training; `training`, the loop with its data;
`sampling`, the chain of a batch and of one image; `data`, images from memory and from JPEG; `import`, of the pipeline
and of a model; `nll`, the bound on the likelihood beside the network alone. Those whose outputs differ are not
compared. Options of train.py, such as `--train_batch_size` and `--compile`, say on what.
"""

if __name__ == "__main__":  # before imports that take seconds
    from hf_ddpm.utils.launch import end_quietly

    end_quietly()

import os
import sys
from pathlib import Path

from tqdm.auto import tqdm

from hf_ddpm.benchmark.options import growth_values, parse_benchmark
from hf_ddpm.benchmark.processes import run_processes
from hf_ddpm.benchmark.report import write_report
from hf_ddpm.benchmark.run import run_benchmark
from hf_ddpm.utils.launch import run_script, use_own_cores


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    options, config = parse_benchmark(argv)
    use_own_cores()
    values, is_main = growth_values(options, config), os.environ.get("RANK", "0") == "0"
    terminal = sys.stderr  # where it is now: what others say while they are timed is not shown
    with tqdm(total=len(values) * len(options.chosen), desc="Tasks", unit="task", disable=not is_main) as bar:

        def tell(what: str) -> None:
            bar.set_postfix_str(what)

        def done(line: str) -> None:
            if is_main:
                bar.write(line, file=terminal)  # known, should all be interrupted
            bar.update()

        if options.growth == "processes":
            report = run_processes(Path(__file__), argv, options, values, tell, done)
        else:
            report = run_benchmark(options, config, tell, done)
    if is_main:
        print(write_report(Path(options.json), report))
    return 0


if __name__ == "__main__":
    run_script(main)
