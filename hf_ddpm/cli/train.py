"""Train a DDPM, sample from it and export the pipeline.

    hf-ddpm train --preset digits --output_dir runs/digits
    hf-ddpm train --dataset my_folder --resolution 64 --output_dir runs/mine
    accelerate launch -m hf_ddpm train --preset cifar10 --mixed_precision bf16 --output_dir runs/cifar10

The same command resumes from the last checkpoint. `hf-ddpm presets` lists the presets. --config accepts the config.yaml
of another run. docs/migration.md maps diffusers and denoising-diffusion-pytorch options to these.

Defaults shown here apply only if --block_out_channels is given. Otherwise a small preset is used (hf-ddpm presets).
"""

import hf_ddpm
from hf_ddpm.config import parse_config
from hf_ddpm.utils.launch import Interrupted


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    config = parse_config(argv, doc=__doc__)
    try:
        hf_ddpm.train(config)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
