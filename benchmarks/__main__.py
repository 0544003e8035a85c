"""Compare the speed of this package with diffusers and denoising-diffusion-pytorch, in turns, in one process.

    python -m benchmarks --preset digits --threads 1 --json digits.json
    python -m benchmarks --preset cifar10 --mixed_precision auto --others_precision no --json cifar10.json
    python -m benchmarks --tasks sampling --growth steps --json steps.json

Tasks: `forward`, the network without gradients; `train_step`, a training step; `training`, the training loop with data
loading; `sampling`, the reverse process of a batch and of one image; `data`, loading images from memory and from JPEG;
`import`, importing the pipeline and loading a model; `nll`, the likelihood bound, and the same network evaluations
alone. Contenders whose outputs differ are not compared. With `--compile`, a contender is compiled once per batch size
without gradients, and once for training. Options of train.py, such as `--train_batch_size` and `--compile`, set the
network, data and precision.
"""

import os
import sys
from pathlib import Path

from benchmarks.options import growth_values, parse_benchmark
from hf_ddpm.utils.files import make_folder
from hf_ddpm.utils.launch import end_quietly, run_script, use_own_cores


def main(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    options, config = parse_benchmark(argv, __doc__)
    for name, file in (("json", options.json), ("profile", options.profile)):
        if file is not None:
            make_folder(Path(file).parent, name)

    from tqdm import tqdm  # these imports are slow

    from benchmarks.report import write_report
    from benchmarks.run import run_benchmark, run_processes

    use_own_cores()
    values, is_main = growth_values(options, config), os.environ.get("RANK", "0") == "0"
    with tqdm(total=len(values) * len(options.chosen), desc="Tasks", unit="task", disable=not is_main) as bar:
        if options.growth == "processes":
            report = run_processes(argv, options, values, bar)
        else:
            report = run_benchmark(options, config, bar)
    if is_main:
        print(write_report(Path(options.json), report))
    return 0


if __name__ == "__main__":
    sys.argv[0] = "benchmarks"
    end_quietly()
    run_script(main)
