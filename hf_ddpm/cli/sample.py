"""Samples images into a folder: `00000.png`, `00001.png`, ... and `grid.png` of the first 64, or `samples.npz`.

    python scripts/sample.py --model runs/digits --num_images 64 --seed 0 --output out
    accelerate launch scripts/sample.py --model org/name --num_images 50000 --format npz --output out

Image `i` of a seed is the same whatever the batch size and the number of processes. The same command goes on after an
interruption, with a larger `--num_images` also after the end: `shards/` holds what is there, `sampling.json` says what
it was made with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from hf_ddpm.images import check_picture
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.sampling.folder import SHARD_SIZE
from hf_ddpm.sampling.generate import compile_for_sampling, fill_folder
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import make_folder
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import option, parse_options, require, require_at_least


@dataclass
class SampleConfig:
    """Of what, how many, and where to."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the images")
    num_images: int = option("number of images", 64)
    format: Literal["png", "npz"] = option(
        "a PNG file per image (1, 3 or 4 channels), or one file of all as an array (any number)", "png"
    )
    batch_size: int = option(f"images at a time and process, at most the {SHARD_SIZE} of a shard", 64)
    compile: bool = option("whether to compile the network first, for many images", False)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "num_images", "batch_size")
        require(self, "output", not Path(self.output).is_file(), "it is a file, a folder is wanted")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config, sampling = parse_options(argv, SampleConfig, Sampling)
    make_folder(Path(config.output), "output")
    state = PartialState(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, state.device)
    if config.format == "png":
        check_picture(pipe.image_shape[0], "--format npz writes them as an array")
    if config.compile:
        compile_for_sampling(pipe.unet)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    folder = fill_folder(
        pipe,
        Path(config.output),
        config.num_images,
        sampling,
        model=config.model,
        batch_size=config.batch_size,
        state=state,
    )
    if config.format == "png":
        folder.write_pictures(range(config.num_images)[state.process_index :: state.num_processes])
    if state.is_main_process:
        if config.format == "npz":
            folder.write_npz(config.num_images)
        folder.write_grid(config.num_images)
    state.wait_for_everyone()
    return 0
