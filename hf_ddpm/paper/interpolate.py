"""Interpolation between two diffused images (Section 4.4, Figs. 8 and 9)."""

from pathlib import Path

import torch
from torch import Tensor

from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.paper.context import VISIBLE_SIGNAL, FigureContext, captioned, rmse, sheet, table
from hf_ddpm.paper.options import InterpolateOptions
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.options import require
from hf_ddpm.utils.seeds import FIGURES

# Number of held-out images from which the two least similar ones are chosen.
CANDIDATES = 16


def interpolate(context: FigureContext, options: InterpolateOptions) -> None:
    """Draw interpolations of two images by weight and timestep, and measure the reconstructions."""
    pair = load_pair(context, options)
    originals = [to_unit(image) for image in pair]
    rows, errors = [], []
    for steps in context.visible(options.diffused):
        source = context.generator(FIGURES)  # same noise in all rows
        weights = [0, 1, *options.weights]
        conditions = context.conditions([0] * len(weights))
        mixed = context.pipe.interpolate(*pair, steps - 1, weights, source, "pt", **conditions).cpu()
        (first, second), between = mixed[:2], mixed[2:]
        rows.append((f"t = {steps}", torch.cat([originals[0], between, originals[1]])))
        errors.append({"diffused": steps, "first": rmse(first, originals[0][0])})
        errors[-1] |= {"second": rmse(second, originals[1][0]), "between": rmse(first, second)}
    names = [f"{weight:g}" for weight in options.weights]
    names[:1] = [f"lambda = {names[0]}"] if names else []
    context.draw("interpolate.png", sheet(rows, ["first", *names, "second"]))
    paragraphs = [
        captioned(
            "interpolate.png",
            "Interpolations",
            "Interpolations of two images (left and right). Both images are diffused by t steps, their latents are "
            "interpolated with the weight lambda of the second image, and the reverse process generates an image from "
            "the result. All images of a row use the same noise.",
        ),
        table(["t", "first", "second", "between them"], [list(row.values()) for row in errors]),
        "RMSE on the scale [0, 255]: between each image and its reconstruction (lambda = 0 or 1), and between the two "
        f"reconstructions. The RMSE between the two images is {rmse(*originals):.4g}. If the reconstructions are much "
        "closer to each other than the images, t is too large: x_t no longer contains the images, and all images of "
        f"the row are nearly the same. By default t are the eighths of T with sqrt(alpha-bar_t) >= {VISIBLE_SIGNAL:g}.",
    ]
    title = "Interpolation (Figs. 8 and 9)"
    context.write("interpolate", title, paragraphs, {"reconstruction_rmse": errors}, options, {})


def least_similar(images: Tensor) -> list[int]:
    """Return the indices of the two images, shape `(N, C, H, W)`, with the largest distance; `[0, 0]` if N is 1."""
    points = images.flatten(1).double()
    return sorted(divmod(int(torch.cdist(points, points).argmax()), len(images)))


def load_pair(context: FigureContext, options: InterpolateOptions) -> list[Tensor]:
    """Return the two images as signed images, shape `(1, C, H, W)`, on the CPU."""
    levels = context.levels
    if options.first is None or options.second is None:
        images = context.reference("nll").held_out
        assert images is not None
        rows = options.rows or least_similar(to_signed(images[torch.arange(min(CANDIDATES, len(images)))], levels))
        require(options, "rows", max(rows) < len(images), f"indices below {len(images)}, the number of images")
        return [to_signed(images[torch.tensor([row])], levels).cpu() for row in rows]
    channels, height, width = context.pipe.image_shape
    shared = context.options
    image_format = ImageFormat(
        height,
        width,
        channels,
        deep=levels > 256,
        value_range=shared.value_range and tuple(shared.value_range),
        background=shared.background or "white",
    )
    pair = []
    for name, file in (("first", options.first), ("second", options.second)):
        try:
            pixels = fit({"bytes": Path(file).read_bytes(), "path": None}, image_format)
        except Exception as error:  # PIL raises errors of many types
            raise ValueError(f"--{name} {file}: cannot be read as an image: {one_line(error)}") from error
        pair.append(to_signed(torch.tensor(pixels)[None], levels))
    return pair
