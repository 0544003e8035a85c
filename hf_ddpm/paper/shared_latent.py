"""Images that share a latent (Section 4.3, Fig. 7): the later it is in the reverse process, the more they agree."""

from dataclasses import asdict

import torch

from hf_ddpm.images import to_unit
from hf_ddpm.paper.options import SHOWN_LATENTS, SharedLatentConfig
from hf_ddpm.paper.pictures import sheet, variety
from hf_ddpm.paper.study import Study, table
from hf_ddpm.utils.seeds import FIGURES, SAMPLES, generator


def shared_latent(study: Study, options: SharedLatentConfig) -> None:
    """Writes `shared-latent`, .json, .md and .png.

    Args:
        study: The model and its data.
        options: How many of what.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
    """
    pipe, seed, device = study.pipe, study.subject.seed, study.accelerator.device
    moments = study.diffused(options.diffused)[::-1]
    sources = [generator(seed, SAMPLES, number, device=device) for number in range(options.latents)]
    latents, _ = pipe.trace([number - 1 for number in moments], options.latents, sources, "pt")
    rows, found = {}, []
    for number in moments:
        x_t, source = latents[number - 1], generator(seed, FIGURES, number, device=device)
        images = pipe.share_latent(number - 1, options.num_images, source, "pt", x_t).cpu()
        groups = images.view(options.latents, options.num_images, *pipe.image_shape)
        found.append({"t": number, "rmse_between_images": variety(groups)})
        for latent in range(min(SHOWN_LATENTS, options.latents)):
            rows[latent, number] = torch.cat([to_unit(x_t[latent : latent + 1].cpu()), groups[latent]])
    # Latent by latent, from T down.
    in_order = sorted(rows.items(), key=lambda row: (row[0][0], -row[0][1]))
    labelled = [(f"latent {latent + 1}, t = {number}", row) for (latent, number), row in in_order]
    study.draw("shared-latent.png", sheet(labelled, ["x_t", *(f"{i + 1}" for i in range(options.num_images))]))
    words = [
        "Images from one latent: each row starts from its x_t, on the left. The rows of a latent are moments of one "
        "reverse process.",
        "![Images from one latent](shared-latent.png)",
        table(["t", "RMSE between two images of a latent"], [list(row.values()) for row in found]),
        f"On the scale [0, 255], over {options.latents} latents of {options.num_images} images each.",
    ]
    options_used, title = asdict(options), "Images from one latent (Fig. 7)"
    study.write("shared-latent", title, "\n\n".join(words), {"moments": found}, options_used, {})
