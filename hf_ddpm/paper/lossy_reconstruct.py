"""Progressive reconstruction of real images (Section 4.3): estimates and samples at several timesteps."""

import torch
from torch import Tensor

from hf_ddpm.images import to_unit
from hf_ddpm.paper.context import VISIBLE_SIGNAL, FigureContext, captioned, rmse, sheet, table
from hf_ddpm.paper.options import LossyReconstructOptions
from hf_ddpm.utils.seeds import FIGURES


def lossy_reconstruct(context: FigureContext, options: LossyReconstructOptions) -> None:
    """Draw estimates and samples of held-out images at several timesteps, and measure rate and distortion."""
    timesteps = context.visible(options.diffused)[::-1]
    reference = context.reference("nll", options.num_images)
    bound = reference.bound(context.pipe, context.options.seed)
    x_start = context.held_out(reference, options.num_images)  # the images of the bound

    images, errors, columns = to_unit(x_start).cpu(), [], []
    for t in timesteps:
        estimates, samples = reconstruct(context, x_start, t - 1)
        columns.append((estimates, samples))
        distortions = {"rmse_of_estimates": rmse(estimates, images), "rmse_of_samples": rmse(samples, images)}
        errors.append({"t": t, "rate_bpd": bound["rate_bpd"][t - 1], **distortions})
    rows = []
    for image in range(len(images)):
        for kind, name in enumerate(("estimate", "sample")):
            shown = [pair[kind][image] for pair in columns]
            rows.append((f"image {image + 1}, {name}", torch.stack([*shown, images[image]])))
    context.draw("lossy-reconstruct.png", sheet(rows, [*(f"t = {t}" for t in timesteps), "image"]))
    paragraphs = [
        captioned(
            "lossy-reconstruct.png",
            "Estimates and samples of real images",
            "Reconstructions of held-out images (right) from x_t after t diffusion steps: the estimate of the image "
            "(Eq. 15), and a sample of p(x_0 | x_t). By default t are the eighths of T with "
            f"sqrt(alpha-bar_t) >= {VISIBLE_SIGNAL:g}.",
        ),
        table(["t", "rate", "RMSE of estimates", "RMSE of samples"], [list(entry.values()) for entry in errors]),
        "Rate: bits per dimension needed to transmit x_t. RMSE on the scale [0, 255]. Means over "
        f"{len(images)} images of {bound['made_by']['dataset']['name']}.",
    ]
    title = "Lossy reconstruction (Section 4.3)"
    context.write("lossy-reconstruct", title, paragraphs, {"moments": errors}, options, bound["made_by"])


def reconstruct(context: FigureContext, x_start: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Return estimates and samples from the same latents at `t`, as unit images on the CPU."""
    source = context.generator(FIGURES, t)
    x_t = context.pipe.encode(x_start, t, source)
    conditions = context.conditions(range(len(x_t)))
    one_step = {"latents": x_t, "timesteps": [t]}  # to x_0
    estimates = context.pipe(len(x_t), source, output_type="pt", **one_step, **conditions).images
    return estimates.cpu(), context.pipe.decode(x_t, t, source, "pt", **conditions).cpu()
