"""Inpainting of held-out images (RePaint, Lugmayr et al. 2022): several fills for each of four masks."""

import torch
from torch import Tensor

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.paper.context import FigureContext, captioned, rmse, sheet, table
from hf_ddpm.paper.options import InpaintingOptions
from hf_ddpm.paper.shared_latent import variety
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.utils.seeds import FIGURES, generator


def inpainting(context: FigureContext, options: InpaintingOptions) -> None:
    """Draw fills of held-out images by mask, and measure their distance from the images and from each other."""
    reference = context.reference("nll", options.num_images)
    assert reference.held_out is not None
    indices = choose(len(reference.held_out), options.num_images, METRIC_SEED)
    x_start = to_signed(reference.held_out[torch.tensor(indices)], context.levels).cpu()
    images = to_unit(x_start)
    rows, measured = [], []
    for name, mask in hidden_parts(*x_start.shape[-2:]).items():
        fills, at_once = (filled(context, x_start, mask, options, jumps) for jumps in (options.jump_n_sample, 1))
        part, again, real = (unit[..., mask] for unit in (fills, at_once, images[:, None].expand_as(fills)))
        measured.append({"mask": name, "filled": mask.float().mean().item(), "rmse": rmse(part, real)})
        measured[-1] |= {"rmse_between_fills": variety(part), "rmse_without_jumps": rmse(again, real)}
        masked = torch.where(mask, 0.5, images)
        for i in range(len(images)):
            rows.append((name if i == 0 else "", torch.stack([images[i], masked[i], *fills[i], at_once[i, 0]])))
    columns = ["image", "masked", *(f"{i + 1}" for i in range(options.fills)), "no jumps"]
    context.draw("inpainting.png", sheet(rows, columns))
    caption = (
        f"Held-out images, what is known of them, {options.fills} fills with other noise, and one without jumps, in "
        "which both parts fit together less well."
    )
    head = ["mask", "share filled", "RMSE", "RMSE between fills", "RMSE without jumps"]
    paragraphs = [
        captioned("inpainting.png", "Inpainted images", caption),
        table(head, [list(row.values()) for row in measured]),
        f"Distance of the filled pixels from those of the image and from each other, RMSE on the scale [0, 255], over "
        f"{len(images)} images. Both distances agree if the image and its fills have the same distribution.",
    ]
    context.write("inpainting", "Inpainting (RePaint)", paragraphs, {"masks": measured}, options, {})


def hidden_parts(height: int, width: int) -> dict[str, Tensor]:
    """Return masks, bool, shape `(H, W)`, true where to fill."""
    row, column = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    everywhere = torch.ones(height, width, dtype=torch.bool)
    in_rows, in_columns = (
        (place >= size // 4) & (place < size - size // 4) for place, size in ((row, height), (column, width))
    )
    return {
        "lower half": (row >= height // 2) & everywhere,
        "square": in_rows & in_columns,
        "every other line": (row % 2 == 1) & everywhere,
        "3 of 4 pixels": (row % 2 == 1) | (column % 2 == 1),
    }


def filled(
    context: FigureContext, x_start: Tensor, mask: Tensor, options: InpaintingOptions, jump_n_sample: int
) -> Tensor:
    """Return fills of signed images as unit images on the CPU, shape `(N, fills, C, H, W)`."""
    pipe, seed, device = context.pipe, context.options.seed, context.accelerator.device
    steps, own = min(options.num_inference_steps, len(pipe.scheduler)), pipe.scheduler
    repeated = x_start.repeat_interleave(options.fills, dim=0)
    parts = []
    try:
        pipe.scheduler = find_scheduler(pipe, "ddpm", steps)
        for batch in torch.arange(len(repeated)).split(context.options.batch_size):
            sources = [generator(seed, FIGURES, i, device=device) for i in batch.tolist()]
            jumps = {"jump_length": options.jump_length, "jump_n_sample": jump_n_sample}
            parts.append(pipe.inpaint(repeated[batch], mask, sources, steps, **jumps, output_type="pt").images.cpu())
    finally:
        pipe.scheduler = own
    return torch.cat(parts).view(len(x_start), options.fills, *x_start.shape[1:])
