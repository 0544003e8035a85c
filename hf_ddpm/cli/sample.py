"""Sample images with a model.

    hf-ddpm sample --model runs/digits --num_images 64 --seed 0 --output out
    accelerate launch -m hf_ddpm sample --model org/name --num_images 50000 --format npz --output out

The output folder gets 00000.png, 00001.png, ... and grid.png with the first 64 images, or samples.npz. Image i of a
seed is the same for any batch size and number of processes. The same command resumes after an interruption; with a
larger --num_images it adds images. shards/ stores the images and sampling.json their settings.
"""

import hf_ddpm
from hf_ddpm.sampling.options import SampleConfig, Sampling
from hf_ddpm.utils.options import parse_options


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    config, sampling = parse_options(argv, SampleConfig, Sampling, doc=__doc__)
    hf_ddpm.sample_images(sampling=sampling, **vars(config))
    from accelerate import PartialState  # slow import

    is_array = config.format == "npz"
    where = f"{config.output}/samples.npz" if is_array else f"{config.output} (overview: {config.output}/grid.png)"
    PartialState().print(f"{config.num_images:,} images: {where}")
    return 0
