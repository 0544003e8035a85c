"""Inpainting of held-out images (RePaint, Lugmayr et al. 2022): several results for each of four masks."""

import torch
from torch import Tensor

from hf_ddpm.images import to_unit
from hf_ddpm.paper.context import FigureContext, captioned, rmse, sheet, table
from hf_ddpm.paper.options import InpaintingOptions
from hf_ddpm.paper.shared_latent import rmse_within
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.utils.seeds import FIGURES


def inpainting(context: FigureContext, options: InpaintingOptions) -> None:
    """Draw inpainted held-out images per mask, and measure their distances to the images and to each other."""
    x_start = context.held_out(context.reference("nll", options.num_images), options.num_images).cpu()
    images = to_unit(x_start)
    rows, measured = [], []
    for name, mask in masks(*x_start.shape[-2:]).items():
        fills, no_jumps = (inpaint(context, x_start, mask, options, jumps) for jumps in (options.jump_n_sample, 1))
        part, part_no_jumps, real = (unit[..., mask] for unit in (fills, no_jumps, images[:, None].expand_as(fills)))
        measured.append({"mask": name, "filled": mask.float().mean().item(), "rmse": rmse(part, real)})
        measured[-1] |= {"rmse_between_fills": rmse_within(part), "rmse_without_jumps": rmse(part_no_jumps, real)}
        masked = torch.where(mask, 0.5, images)
        for i in range(len(images)):
            rows.append((name if i == 0 else "", torch.stack([images[i], masked[i], *fills[i], no_jumps[i, 0]])))
    columns = ["image", "masked", *(f"{i + 1}" for i in range(options.fills)), "no jumps"]
    context.draw("inpainting.png", sheet(rows, columns))
    caption = (
        f"From left to right: held-out image, masked image, {options.fills} results with different noise, and a result "
        "without jumps, in which the filled pixels fit the known ones less well."
    )
    head = ["mask", "filled fraction", "RMSE to the image", "RMSE between results", "RMSE without jumps"]
    paragraphs = [
        captioned("inpainting.png", "Inpainted images", caption),
        table(head, [list(row.values()) for row in measured]),
        f"RMSE of the filled pixels on the scale [0, 255], for {len(images)} images: to the image, and between two "
        "results. Both are equal if the image and the results have the same distribution.",
    ]
    context.write("inpainting", "Inpainting (RePaint)", paragraphs, {"masks": measured}, options, {})


def masks(height: int, width: int) -> dict[str, Tensor]:
    """Return masks by name, bool, shape `(H, W)`, True at pixels to fill."""
    row, column = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    everywhere = torch.ones(height, width, dtype=torch.bool)
    in_rows, in_columns = (
        (index >= size // 4) & (index < size - size // 4) for index, size in ((row, height), (column, width))
    )
    return {
        "lower half": (row >= height // 2) & everywhere,
        "square": in_rows & in_columns,
        "every other line": (row % 2 == 1) & everywhere,
        "3 of 4 pixels": (row % 2 == 1) | (column % 2 == 1),
    }


def inpaint(
    context: FigureContext, x_start: Tensor, mask: Tensor, options: InpaintingOptions, jump_n_sample: int
) -> Tensor:
    """Return inpainted signed images as unit images on the CPU, shape `(N, fills, C, H, W)`."""
    pipe, own = context.pipe, context.pipe.scheduler
    steps = min(options.num_inference_steps, len(own))
    repeated = x_start.repeat_interleave(options.fills, dim=0)
    parts = []
    try:
        pipe.scheduler = find_scheduler(pipe, "ddpm", steps)
        for batch in torch.arange(len(repeated)).split(context.options.batch_size):
            sources = [context.generator(FIGURES, i) for i in batch.tolist()]
            jumps = {"jump_length": options.jump_length, "jump_n_sample": jump_n_sample}
            options_of_batch = {**jumps, **context.conditions((batch // options.fills).tolist())}
            filled = pipe.inpaint(repeated[batch], mask, sources, steps, output_type="pt", **options_of_batch)
            parts.append(filled.images.cpu())
    finally:
        pipe.scheduler = own
    return torch.cat(parts).view(len(x_start), options.fills, *x_start.shape[1:])
