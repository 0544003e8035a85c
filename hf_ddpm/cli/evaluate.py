"""Evaluates a model, or images that it has generated, and writes `results.json`.

    python scripts/evaluate.py --model runs/digits --dataset digits --metrics fd,kid,is,pr,nll --output results.json
    accelerate launch scripts/evaluate.py --model org/name --dataset uoft-cs/cifar10 --metrics fd --num_images 10000
    python scripts/evaluate.py --samples out --dataset my_images --metrics fd,pr --extractor facebook/dinov2-large

Metrics: `fd` (or `fid`), the Frechet distance; `kid`, the kernel distance; `is`, the Inception score; `pr`, precision
and recall; `nll`, the variational bound on the negative log-likelihood in bits a dimension, with `T` network
evaluations an image (`--steps_per_image` makes it a cheaper estimate). The same command goes on after an interruption.
"""

from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_ddpm.evaluation.evaluate import Evaluator, identify
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.evaluation.results import read_results, scalars
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.sampling.folder import open_samples
from hf_ddpm.sampling.generate import compile_for_sampling
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import make_folder
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import parse_options


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config, sampling = parse_options(argv, EvaluateConfig, Sampling)
    output = Path(config.output)
    read_results(output)  # what cannot be added to is told before anything is computed
    make_folder(output.parent, "output")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()
    pipe = None if config.model is None else load_pipeline(config.model, accelerator.device)
    if pipe is not None and config.compile:
        compile_for_sampling(pipe.unet)
    images = open_samples(Path(config.samples)) if config.samples is not None and config.compared else None
    model, shape = identify(config, pipe, images)
    evaluator = Evaluator(config, shape, accelerator, log=cache(accelerator.print))  # once, not per split
    for figures in evaluator.evaluate(output, sampling, pipe, images, model=model, tell=accelerator.print):
        for name, figure in scalars(figures).items():
            accelerator.print(to_json({name: figure}, indent=2))
    accelerator.end_training()
    return 0
