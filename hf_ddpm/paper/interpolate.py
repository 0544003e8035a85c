"""Interpolation between two diffused images (Section 4.4, Figs. 8 and 9)."""

from pathlib import Path

import torch
from torch import Tensor

from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.paper.context import FigureContext, rmse, sheet, table
from hf_ddpm.paper.options import InterpolateOptions
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.options import require
from hf_ddpm.utils.seeds import FIGURES, generator


def interpolate(context: FigureContext, options: InterpolateOptions) -> None:
    """Draw mixtures of two images by weight and by steps of diffusion, and measure the reconstructions."""
    pair = ends(context, options)
    sources = [to_unit(image) for image in pair]
    rows, errors = [], []
    for steps in context.diffused(options.diffused):
        source = generator(context.options.seed, FIGURES, device=context.accelerator.device)  # one draw for all rows
        mixed = context.pipe.interpolate(*pair, steps - 1, [0, 1, *options.weights], source, "pt").cpu()
        (first, second), between = mixed[:2], mixed[2:]
        rows.append((f"{steps} steps", torch.cat([sources[0], between, sources[1]])))
        errors.append({"diffused": steps, "first": rmse(first, sources[0][0]), "second": rmse(second, sources[1][0])})
    context.draw("interpolate.png", sheet(rows, ["first", *(f"{weight:g}" for weight in options.weights), "second"]))
    paragraphs = [
        "Two images diffused by some steps, mixed with a weight, and brought back by the reverse process; on the left "
        "and on the right the images themselves. All draws are the same within a row.",
        "![Interpolations](interpolate.png)",
        table(["steps of diffusion", "first", "second"], [list(row.values()) for row in errors]),
        "How far reconstructions, the interpolations at the weights 0 and 1, are from the images: RMSE on the scale "
        "[0, 255].",
    ]
    title = "Interpolation (Figs. 8 and 9)"
    context.write("interpolate", title, paragraphs, {"reconstruction_rmse": errors}, options, {})


def ends(context: FigureContext, options: InterpolateOptions) -> list[Tensor]:
    """Return the two images as signed images, shape `(1, C, H, W)`, on the CPU."""
    levels = context.levels
    if options.first is None or options.second is None:
        images = context.reference("nll").held_out
        assert images is not None
        require(options, "rows", max(options.rows) < len(images), f"less than the {len(images)} of the split")
        return [to_signed(images[torch.tensor([row])], levels).cpu() for row in options.rows]
    channels, height, width = context.pipe.image_shape
    limits = context.options.value_range
    image_format = ImageFormat(height, width, channels, deep=levels > 256, value_range=limits and tuple(limits))
    pair = []
    for name, file in (("first", options.first), ("second", options.second)):
        try:
            pixels = fit({"bytes": Path(file).read_bytes(), "path": None}, image_format)
        except Exception as error:  # PIL raises anything
            raise ValueError(f"{name}={file!r} is no image that can be used: {one_line(error)}") from error
        pair.append(to_signed(torch.tensor(pixels)[None], levels))
    return pair
