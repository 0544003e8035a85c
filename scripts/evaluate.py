"""Evaluates a model, or images that it has generated, and writes `results.json`.

    python scripts/evaluate.py --model runs/digits --dataset digits --metrics fd,kid,is,pr,nll --output results.json
    accelerate launch scripts/evaluate.py --model org/name --dataset uoft-cs/cifar10 --metrics fd --num_images 10000
    python scripts/evaluate.py --samples out --dataset my_images --metrics fd,pr --extractor facebook/dinov2-large

Metrics: `fd` (or `fid`), the Frechet distance; `kid`, the kernel distance; `is`, the Inception score; `pr`, precision
and recall; `nll`, the variational bound on the negative log-likelihood in bits a dimension, with `T` network
evaluations an image (`--steps_per_image` makes it a cheaper estimate). The same command goes on after an interruption.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.data.samples import open_samples
from hf_ddpm.data.sources import choose
from hf_ddpm.data.store import ImageStore, load_images
from hf_ddpm.evaluation.collect import Processes
from hf_ddpm.evaluation.comparison import compare
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.evaluation.reference import fingerprint
from hf_ddpm.evaluation.report import METRIC_SEED, provenance, read_results, record
from hf_ddpm.evaluation.request import EvaluateConfig, classes_for, identify
from hf_ddpm.images import save_picture
from hf_ddpm.launch import run_script, use_own_cores
from hf_ddpm.options import parse_options
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.sampling import Sampling, fill_folder


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config, sampling = parse_options(argv, EvaluateConfig, Sampling)
    output = Path(config.output)
    read_results(output)  # what cannot be added to is told before anything is computed
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    use_own_cores()
    pipe = None if config.model is None else load_pipeline(config.model, device)
    images = open_samples(Path(config.samples)) if config.samples is not None and config.compared else None
    model, shape = identify(config, pipe, images)
    extractor = None
    if config.compared:
        extractor = load_extractor(config.extractor, device, weights=config.extractor_weights)
        config.check_extractor(extractor, shape)
    with accelerator.main_process_first():
        held_out = load(config, config.split, shape, device) if config.needs_held_out else None
        reference = load(config, config.reference_split, shape, device) if config.compared else None
    count = config.count(*(None if found is None else len(found) for found in (held_out, reference, images)))

    made_by = {"seed": sampling.seed, "metric_seed": METRIC_SEED, **provenance(device)}
    entries: dict[str, Any] = {"config": asdict(config) | asdict(sampling), "versions": made_by["versions"]}
    if pipe is not None:
        entries |= {key: pipe.scheduler.config.get(key) for key in ("num_train_timesteps", "variance_type")}
    if "nll" in config.chosen:
        numbers = choose(len(held_out), config.num_images, METRIC_SEED)
        data = {"name": config.dataset, "split": config.split, "fingerprint": fingerprint(held_out, numbers)}
        bound = evaluate_nll(config, accelerator, pipe, held_out, numbers, sampling.seed)
        finish(accelerator, output, model, entries, {"nll": bound | {"made_by": made_by | {"dataset": data}}})
    if config.compared:
        if images is None:
            images = sample(config, sampling, accelerator, pipe, count)
        made_by |= {"samples": str(images.path), "sampling": getattr(images, "settings", None)}
        processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.gather)
        held_out = held_out if config.floor else None
        figures, picture = compare(config, extractor, images, reference, held_out, count, processes)
        figures = {name: figure | {"made_by": made_by | figure["made_by"]} for name, figure in figures.items()}
        finish(accelerator, output, model, entries, figures)
        if picture is not None:
            save_picture(picture, output.with_name(f"{output.stem}_nearest.png"))
    accelerator.end_training()
    return 0


def load(config: EvaluateConfig, split: str, shape: tuple[int, ...], device: torch.device) -> ImageStore:
    """Returns the images of a split."""
    return load_images(
        config.dataset,
        split=split,
        column=config.image_column,
        resolution=tuple(shape[1:]),
        channels=shape[0],
        levels=config.levels,
        class_column=config.class_column,
        device=device,
    )


def sample(config: EvaluateConfig, sampling: Sampling, accelerator: Accelerator, pipe: DDPMPipeline, count: int):
    """Returns generated images; they stay in a folder of their settings beside the results."""
    folder = Path(config.output).with_name(f"{Path(config.output).stem}_samples")
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not accelerator.is_main_process)
    return fill_folder(
        pipe,
        folder / sampling.folder_name(pipe, accelerator.device),
        count,
        sampling,
        model=config.model,
        batch_size=config.batch_size,
        state=accelerator,
    )


def finish(accelerator: Accelerator, output: Path, model: dict, entries: dict, figures: dict[str, dict]) -> None:
    """Writes figures and prints them."""
    if accelerator.is_main_process:
        if record(output, model, entries | figures):
            print(f"{output} held results of another model: they are gone")
        for name, figure in figures.items():
            shown = {key: value for key, value in figure.items() if not isinstance(value, list | dict)}
            print(json.dumps({name: shown}, indent=2))


def evaluate_nll(config, accelerator: Accelerator, pipe: DDPMPipeline, images: ImageStore, ids, seed: int) -> dict:
    """Returns the figures of the bound, from all processes."""
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise ValueError(f"nll needs a DDPMScheduler, not the {type(pipe.scheduler).__name__} of {config.model!r}")
    classes = classes_for(pipe, images.labels, images.class_names, len(images))
    mine = ids[accelerator.process_index :: accelerator.num_processes]
    total = len(mine) * (config.steps_per_image or len(pipe.scheduler.diffusion))
    with tqdm(total=total, desc="nll", unit="evaluation", disable=not accelerator.is_main_process) as bar:
        bound = variational_bound(
            pipe.unet.eval(),
            pipe.scheduler,
            images,
            mine,
            seed=seed,
            batch_size=config.batch_size,
            levels=config.levels,
            steps_per_image=config.steps_per_image,
            classes=classes,
            progress=bar.update,
        )
    return bound.summed(lambda value: accelerator.reduce(value, reduction="sum")).report()


if __name__ == "__main__":
    run_script(main)
