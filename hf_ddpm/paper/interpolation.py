"""Interpolation between two images where they have been diffused to (Section 4.4, Figs. 8 and 9)."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_ddpm.data.transforms import ImageFormat, fit
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.paper.pictures import rmse, sheet
from hf_ddpm.paper.study import Study, table
from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.options import option, require
from hf_ddpm.utils.seeds import FIGURES, generator


@dataclass
class InterpolateConfig:
    """Two images mixed after some steps of diffusion, and brought back (Figs. 8, 9)."""

    first: str | None = option("file of an image", None)
    second: str | None = option("file of another image", None)
    rows: list[int] = option("without files: numbers of two held-out images", factory=lambda: [0, 1])
    diffused: list[int] = option("steps of diffusion, from 1 to T; quarters of T by default", factory=list)
    weights: list[float] = option(
        "weights of the second image, in [0, 1]", factory=lambda: [tenth / 10 for tenth in range(11)]
    )

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "second", (self.first is None) == (self.second is None), "both files, or none")
        require(self, "rows", len(self.rows) == 2 and min(self.rows) >= 0, "two numbers, at least 0")
        require(self, "weights", all(0 <= weight <= 1 for weight in self.weights), "in [0, 1]")


def interpolate(study: Study, options: InterpolateConfig) -> None:
    """Writes `interpolate`, .json, .md and .png.

    Args:
        study: The model and its data.
        options: Which images, and how to mix them.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
    """
    pair = ends(study, options)
    sources = [to_unit(image) for image in pair]
    rows, found = [], []
    for number in study.diffused(options.diffused):
        source = generator(study.subject.seed, FIGURES, device=study.accelerator.device)  # one draw for all rows
        mixed = study.pipe.interpolate(*pair, number - 1, [0, 1, *options.weights], source, "pt").cpu()
        (first, second), between = mixed[:2], mixed[2:]
        rows.append((f"{number} steps", torch.cat([sources[0], between, sources[1]])))
        found.append({"diffused": number, "first": rmse(first, sources[0][0]), "second": rmse(second, sources[1][0])})
    study.draw("interpolate.png", sheet(rows, ["first", *(f"{weight:g}" for weight in options.weights), "second"]))
    words = [
        "Two images diffused by some steps, mixed with a weight, and brought back by the reverse process; on the left "
        "and on the right the images themselves. All draws are the same within a row.",
        "![Interpolations](interpolate.png)",
        table(["steps of diffusion", "first", "second"], [list(row.values()) for row in found]),
        "How far reconstructions, the interpolations at the weights 0 and 1, are from the images: RMSE on the scale "
        "[0, 255].",
    ]
    options_used, title = asdict(options), "Interpolation (Figs. 8 and 9)"
    study.write("interpolate", title, "\n\n".join(words), {"reconstruction_rmse": found}, options_used, {})


def ends(study: Study, options: InterpolateConfig) -> list[Tensor]:
    """Returns the two images as signed images, shape `(1, C, H, W)`, on the CPU."""
    levels = study.levels
    if options.first is None or options.second is None:
        images = study.evaluator("nll").held_out
        assert images is not None
        require(options, "rows", max(options.rows) < len(images), f"less than the {len(images)} of the split")
        return [to_signed(images[torch.tensor([row])], levels).cpu() for row in options.rows]
    channels, height, width = study.pipe.image_shape
    limits = study.subject.value_range
    image_format = ImageFormat(height, width, channels, deep=levels > 256, value_range=limits and tuple(limits))
    pair = []
    for name, file in (("first", options.first), ("second", options.second)):
        try:
            pixels = fit({"bytes": Path(file).read_bytes(), "path": None}, image_format)
        except Exception as error:  # whatever PIL raises
            raise ValueError(f"{name}={file!r} is no image that can be used: {one_line(error)}") from error
        pair.append(to_signed(torch.tensor(pixels)[None], levels))
    return pair
