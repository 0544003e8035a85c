"""Evaluates a model on images and writes `results.json`.

    python scripts/evaluate.py --model runs/digits --dataset digits --split test --metrics nll --output results.json
    accelerate launch scripts/evaluate.py --model org/name --dataset uoft-cs/cifar10 --metrics nll --num_images 1000

Metrics: `nll`, the variational bound on the negative log-likelihood in bits a dimension, with `T` network evaluations
an image; `--steps_per_image` makes it a cheaper estimate.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import hf_ddpm
from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.launch import run_script, use_own_cores
from hf_ddpm.options import option, parse_options
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline

METRICS = ("nll",)


@dataclass
class EvaluateConfig:
    """What to evaluate, on what."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    dataset: str = option("digits, a folder of images or parquet files, a parquet file, or a Hub id")
    split: str = option("split to evaluate on", "test")
    image_column: str | None = option("column of the images; guessed by default", None)
    class_column: str | None = option("column of the classes, for a conditioned model; auto guesses it", None)
    metrics: str = option(f"any of {', '.join(METRICS)}, with commas", "nll")
    num_images: int | None = option("images to evaluate on; all of the split by default", None)
    levels: int | None = option("evenly spaced values that a pixel takes; 17 for digits, else 256 by default", None)
    steps_per_image: int | None = option("nll: steps evaluated an image, an estimate; all by default", None)
    batch_size: int = option("network evaluations at a time and process", 256)
    seed: int = option("seed of the noise", 0)
    output: str = option("file of the results", "results.json")

    def __post_init__(self) -> None:
        """Checks the values."""
        for metric in self.metrics.split(","):
            if metric not in METRICS:
                raise ValueError(f"metrics={metric!r} is not allowed: any of {', '.join(METRICS)}, with commas")
        for name in ("num_images", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: at least 1")
        if Path(self.output).is_dir():
            raise ValueError(f"output={self.output!r} is not allowed: it is a folder, a file is wanted")
        if self.levels is None:
            self.levels = 17 if self.dataset == "digits" else 256


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    (config,) = parse_options(argv, EvaluateConfig)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = load_pipeline(config.model, accelerator.device)
    channels, *size = pipe.image_shape
    with accelerator.main_process_first():
        images = load_images(
            config.dataset,
            split=config.split,
            column=config.image_column,
            resolution=tuple(size),
            channels=channels,
            levels=config.levels,
            class_column=config.class_column,
            device=accelerator.device,
        )
    count = config.num_images or len(images)
    if count > len(images):
        raise ValueError(f"num_images={count} is not allowed: at most the {len(images)} of {config.dataset!r}")
    results = {
        "nll": evaluate_nll(config, accelerator, pipe, images, range(count)),
        "config": asdict(config),
        "num_train_timesteps": pipe.scheduler.config.num_train_timesteps,
        "variance_type": pipe.scheduler.config.variance_type,
        "versions": {"hf_ddpm": hf_ddpm.__version__, "torch": torch.__version__},
    }
    if accelerator.is_main_process:
        output.write_text(json.dumps(results, indent=2) + "\n")
        print(
            json.dumps({key: value for key, value in results["nll"].items() if not isinstance(value, list)}, indent=2)
        )
    accelerator.end_training()
    return 0


def evaluate_nll(config: EvaluateConfig, accelerator: Accelerator, pipe: DDPMPipeline, images, ids: range) -> dict:
    """Returns the figures of the bound, from all processes."""
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise ValueError(f"nll needs a DDPMScheduler, not the {type(pipe.scheduler).__name__} of {config.model!r}")
    classes = images.labels
    if classes is None and pipe.unet.config.num_class_embeds is not None:
        if pipe.null_class is None:
            raise ValueError(f"{config.model!r} is conditioned on classes: class_column is missing")
        classes = torch.full((len(images),), pipe.null_class)
    mine = ids[accelerator.process_index :: accelerator.num_processes]
    per_image = config.steps_per_image or len(pipe.scheduler.diffusion)
    bar = tqdm(total=len(mine) * per_image, desc="nll", unit="evaluation", disable=not accelerator.is_main_process)
    with bar:
        bound = variational_bound(
            pipe.unet.eval(),
            pipe.scheduler,
            images,
            mine,
            seed=config.seed,
            batch_size=config.batch_size,
            levels=config.levels,
            steps_per_image=config.steps_per_image,
            classes=classes,
            progress=bar.update,
        )
    return bound.summed(lambda value: accelerator.reduce(value, reduction="sum")).report()


if __name__ == "__main__":
    run_script(main)
