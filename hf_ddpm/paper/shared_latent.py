"""Images from a shared latent (Section 4.3, Fig. 7), and their differences per timestep."""

import torch
from torch import Tensor

from hf_ddpm.images import to_unit
from hf_ddpm.paper.context import FigureContext, captioned, sheet, table
from hf_ddpm.paper.options import SharedLatentOptions
from hf_ddpm.utils.seeds import FIGURES, SAMPLES

# Number of latents in the picture; the others are only measured.
SHOWN = 2


def shared_latent(context: FigureContext, options: SharedLatentOptions) -> None:
    """Draw images from the same latents at several timesteps, and measure their differences."""
    pipe, timesteps = context.pipe, context.diffused(options.diffused)[::-1]
    sources = [context.generator(SAMPLES, index) for index in range(options.latents)]
    conditions = context.conditions(range(options.latents))
    latents, _ = pipe.trace([t - 1 for t in timesteps], options.latents, sources, "pt", **conditions)
    rows, differences = {}, []
    for t in timesteps:
        x_t, source = latents[t - 1], context.generator(FIGURES, t)
        images = pipe.share_latent(t - 1, options.num_images, source, "pt", x_t, **conditions).cpu()
        groups = images.view(options.latents, options.num_images, *pipe.image_shape)
        differences.append({"t": t, "rmse_between_images": rmse_within(groups)})
        for latent in range(min(SHOWN, options.latents)):
            rows[latent, t] = torch.cat([to_unit(x_t[latent : latent + 1].cpu()), groups[latent]])
    # Grouped by latent, with descending t.
    in_order = sorted(rows.items(), key=lambda row: (row[0][0], -row[0][1]))
    labeled = [(f"latent {latent + 1}, t = {t}", row) for (latent, t), row in in_order]
    context.draw("shared-latent.png", sheet(labeled, ["x_t", *(f"{i + 1}" for i in range(options.num_images))]))
    paragraphs = [
        captioned(
            "shared-latent.png",
            "Images from one latent",
            f"Each row shows a latent x_t on the left, and {options.num_images} images that the reverse process "
            "generates from it with different noise. The rows of a latent belong to the same reverse process: the "
            "smaller t is, the more of the image is already determined.",
        ),
        table(["t", "RMSE between two images of a latent"], [list(row.values()) for row in differences]),
        f"RMSE on the scale [0, 255], over {options.latents} latents with {options.num_images} images each.",
    ]
    title = "Images from one latent (Fig. 7)"
    context.write("shared-latent", title, paragraphs, {"moments": differences}, options, {})


def rmse_within(unit: Tensor) -> float:
    """Return the root mean squared difference of two images of the same group, on the scale [0, 255].

    Args:
        unit: Unit images, shape `(groups, N, C, H, W)`, with `N` at least 2.
    """
    # The mean of (x - y)^2 over all pairs is twice the unbiased variance.
    return 255 * (2 * unit.var(dim=1)).mean().sqrt().item()
