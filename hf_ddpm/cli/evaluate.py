"""Evaluate a model or generated images; write the metrics to results.json.

    hf-ddpm evaluate --model runs/digits --dataset digits --metrics fd,kid,is,pr,nll --output results.json
    accelerate launch -m hf_ddpm evaluate --model org/name --dataset uoft-cs/cifar10 --metrics fd --num_images 10000
    hf-ddpm evaluate --samples out --dataset my_images --metrics fd,pr --extractor facebook/dinov2-large

Metrics: fd (or fid), the Frechet distance; kid, the kernel distance; is, the Inception score; pr, precision and recall;
nll, the variational bound on the negative log-likelihood in bits per dimension, with T network evaluations per image
(--steps_per_image gives a cheaper estimate). The same command resumes after an interruption.
"""

from functools import cache
from pathlib import Path

from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.options import parse_options


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    config, sampling = parse_options(argv, EvaluateConfig, Sampling, doc=__doc__)
    import torch  # slow imports
    from accelerate import Accelerator

    from hf_ddpm.evaluation.evaluate import evaluate
    from hf_ddpm.evaluation.results import Metrics, scalars
    from hf_ddpm.utils.files import make_folder
    from hf_ddpm.utils.jsonl import to_json
    from hf_ddpm.utils.launch import use_own_cores

    make_folder(Path(config.output).parent, "output")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    use_own_cores()

    def show(metrics: Metrics) -> None:
        accelerator.print(to_json(scalars(metrics), indent=2))

    evaluate(config, sampling, on_figures=show, log=cache(accelerator.print))  # print each line once, not per split
    accelerator.end_training()
    return 0
