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
from hf_ddpm.utils.seeds import FIGURES, generator

# Held-out images from which two unlike ones are chosen.
CANDIDATES = 16


def interpolate(context: FigureContext, options: InterpolateOptions) -> None:
    """Draw mixtures of two images by weight and by steps of diffusion, and measure the reconstructions."""
    pair = ends(context, options)
    sources = [to_unit(image) for image in pair]
    rows, errors = [], []
    for steps in context.informed(options.diffused):
        source = generator(context.options.seed, FIGURES, device=context.accelerator.device)  # one draw for all rows
        mixed = context.pipe.interpolate(*pair, steps - 1, [0, 1, *options.weights], source, "pt").cpu()
        (first, second), between = mixed[:2], mixed[2:]
        rows.append((f"t = {steps}", torch.cat([sources[0], between, sources[1]])))
        errors.append({"diffused": steps, "first": rmse(first, sources[0][0]), "second": rmse(second, sources[1][0])})
        errors[-1]["between"] = rmse(first, second)
    names = [f"{weight:g}" for weight in options.weights]
    names[:1] = [f"lambda = {names[0]}"] if names else []
    context.draw("interpolate.png", sheet(rows, ["first", *names, "second"]))
    paragraphs = [
        captioned(
            "interpolate.png",
            "Interpolations",
            "Two images (left and right) diffused by t steps, mixed with the weight lambda of the second, and brought "
            "back by the reverse process. All draws are the same within a row.",
        ),
        table(["t", "first", "second", "between them"], [list(row.values()) for row in errors]),
        "Distance of the reconstructions (lambda = 0 and 1) from the images, and from each other: RMSE on the scale "
        f"[0, 255]. The images are {rmse(*sources):.4g} apart. Reconstructions that are far nearer to each other "
        "than that are diffused too far: x_t has lost both images, the reverse process forgets it, and the row is "
        f"constant. By default t are the eighths of T at which sqrt(alpha-bar_t) is at least {VISIBLE_SIGNAL:g}.",
    ]
    title = "Interpolation (Figs. 8 and 9)"
    context.write("interpolate", title, paragraphs, {"reconstruction_rmse": errors}, options, {})


def unlike(images: Tensor) -> list[int]:
    """Return the indices of the two images, shape `(N, C, H, W)`, that are farthest apart; `[0, 0]` of a single one."""
    points = images.flatten(1).double()
    return sorted(divmod(int(torch.cdist(points, points).argmax()), len(images)))


def ends(context: FigureContext, options: InterpolateOptions) -> list[Tensor]:
    """Return the two images as signed images, shape `(1, C, H, W)`, on the CPU."""
    levels = context.levels
    if options.first is None or options.second is None:
        images = context.reference("nll").held_out
        assert images is not None
        rows = options.rows or unlike(to_signed(images[torch.arange(min(CANDIDATES, len(images)))], levels))
        require(options, "rows", max(rows) < len(images), f"less than the {len(images)} of the split")
        return [to_signed(images[torch.tensor([row])], levels).cpu() for row in rows]
    channels, height, width = context.pipe.image_shape
    given = context.options
    image_format = ImageFormat(
        height,
        width,
        channels,
        deep=levels > 256,
        value_range=given.value_range and tuple(given.value_range),
        background=given.background or "white",
    )
    pair = []
    for name, file in (("first", options.first), ("second", options.second)):
        try:
            pixels = fit({"bytes": Path(file).read_bytes(), "path": None}, image_format)
        except Exception as error:  # PIL raises anything
            raise ValueError(f"{name}={file!r} is no image that can be used: {one_line(error)}") from error
        pair.append(to_signed(torch.tensor(pixels)[None], levels))
    return pair
