r"""Progressive decoding of real images (Section 4.3): what is received by and by, and samples that agree with it."""

from dataclasses import asdict

import torch
from torch import Tensor

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.paper.options import LossyConfig
from hf_ddpm.paper.pictures import rmse, sheet
from hf_ddpm.paper.study import Study, table
from hf_ddpm.utils.seeds import FIGURES, generator


def lossy_reconstruct(study: Study, options: LossyConfig) -> None:
    """Writes `lossy-reconstruct`, .json, .md and .png.

    Args:
        study: The model and its data.
        options: How many images, and when.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
    """
    moments = study.diffused(options.diffused)[::-1]
    evaluator = study.evaluator("nll", options.num_images)
    bound = evaluator.bound(study.pipe, study.subject.seed)
    assert evaluator.held_out is not None
    numbers = choose(len(evaluator.held_out), options.num_images, METRIC_SEED)  # those of the bound
    x_start = to_signed(evaluator.held_out[torch.tensor(numbers)], study.levels)

    images, found, columns = to_unit(x_start).cpu(), [], []
    for number in moments:
        estimates, samples = received(study, x_start, number - 1)
        columns.append((estimates, samples))
        distortions = {"rmse_of_estimates": rmse(estimates, images), "rmse_of_samples": rmse(samples, images)}
        found.append({"t": number, "rate_bpd": bound["rate_bpd"][number - 1], **distortions})
    rows = []
    for image in range(len(images)):
        for kind, name in enumerate(("estimate", "sample")):
            seen = [pair[kind][image] for pair in columns]
            rows.append((f"image {image + 1}, {name}", torch.stack([*seen, images[image]])))
    study.draw("lossy-reconstruct.png", sheet(rows, [*(f"t = {number}" for number in moments), "image"]))
    words = [
        "Held-out images diffused to t (columns) and received again: the estimate (Eq. 15) and a sample of "
        "p(x_0 | x_t). The rate is what has to be sent for them, in bits a dimension.",
        "![Estimates and samples of real images](lossy-reconstruct.png)",
        table(["t", "rate", "RMSE of estimates", "RMSE of samples"], [list(moment.values()) for moment in found]),
        f"On the scale [0, 255], over {len(images)} images of {bound['made_by']['dataset']['name']}.",
    ]
    title, made_by = "Lossy reconstruction (Section 4.3)", bound["made_by"]
    study.write("lossy-reconstruct", title, "\n\n".join(words), {"moments": found}, asdict(options), made_by)


def received(study: Study, x_start: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Returns the estimates and samples, as unit images on the CPU, that go with one draw of the latents at `t`."""
    source = generator(study.subject.seed, FIGURES, t, device=study.accelerator.device)
    x_t = study.pipe.encode(x_start, t, source)
    estimates = study.pipe(len(x_t), source, output_type="pt", latents=x_t, timesteps=[t]).images  # one step to x_0
    return estimates.cpu(), study.pipe.decode(x_t, t, source, "pt").cpu()
