"""Samples images into a folder: `00000.png`, `00001.png`, ... and `grid.png` of the first 64.

    python scripts/sample.py --model runs/digits --num_images 64 --seed 0 --output out
    accelerate launch scripts/sample.py --model org/name --num_images 50000 --output out

Image `i` of a seed is the same whatever the batch size and the number of processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from hf_ddpm.images import grid, save_picture, to_pil
from hf_ddpm.launch import run_script, use_own_cores
from hf_ddpm.options import option, parse_options
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.sampling import sample_images, use_scheduler


@dataclass
class SampleConfig:
    """What to sample."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the images")
    num_images: int = option("number of images", 64)
    seed: int = option("which infinite row of images to take them from", 0)
    num_inference_steps: int = option("steps of the reverse process", 1000)
    scheduler: Literal["ddpm", "ddim", "dpmsolver++"] = option("how to walk the reverse process", "ddpm")
    eta: float = option("noise of ddim, from 0 for none to 1 for that of ddpm", 0.0)
    class_labels: list[str] = option("names or numbers of classes that the images go through in turn", factory=list)
    guidance_scale: float = option("strength of classifier-free guidance; 1 for none", 1.0)
    batch_size: int = option("images at a time and process", 64)

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("num_images", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is not allowed: in [0, 1]")
        if self.eta and self.scheduler != "ddim":
            raise ValueError(f"eta={self.eta} is not allowed with scheduler={self.scheduler}: only with ddim")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is not allowed: at least 0")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    (config,) = parse_options(argv, SampleConfig)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, state.device)
    use_scheduler(pipe, config.scheduler)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)

    mine = range(config.num_images)[state.process_index :: state.num_processes]
    with tqdm(total=len(mine), desc="Images", unit="image", disable=not state.is_main_process) as bar:
        for number, image in sample_images(
            pipe,
            mine,
            seed=config.seed,
            num_inference_steps=config.num_inference_steps,
            batch_size=config.batch_size,
            eta=config.eta,
            class_labels=[
                int(label) if label.isdecimal() and label not in pipe.class_names else label
                for label in config.class_labels
            ],
            guidance_scale=config.guidance_scale,
            device=state.device,
        ):
            save_picture(to_pil(image[None])[0], folder / f"{number:05d}.png")
            bar.update()
    state.wait_for_everyone()
    if state.is_main_process:
        first = [Image.open(folder / f"{number:05d}.png") for number in range(min(config.num_images, 64))]
        save_picture(grid(first), folder / "grid.png")
    return 0


if __name__ == "__main__":
    run_script(main)
