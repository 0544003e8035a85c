r"""Progressive generation (Section 4.3, Figs. 6 and 10): :math:`\hat x_0` while :math:`x_t` is still on its way."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.images import bytes_to_unit, to_bytes
from hf_ddpm.paper.pictures import rmse, sheet
from hf_ddpm.paper.study import Study, table
from hf_ddpm.paper.yardstick import DistanceToReference, what_was_compared
from hf_ddpm.utils.options import option, require, require_at_least
from hf_ddpm.utils.seeds import SAMPLES, generator


@dataclass
class ProgressiveConfig:
    """What is known of images while they are sampled (Figs. 6, 10): a picture, an animation, and distances."""

    shown: int = option("images in the picture", 8)
    columns: int = option("moments in the picture, and of the distances", 11)
    frames: int = option("moments in the animation", 51)
    num_images: int = option("images for the distance at each moment, at least 2; 0 for no distances", 100)
    animation: Literal["gif", "webp"] = option("format of the animation", "gif")

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 1, "shown")
        require_at_least(self, 2, "columns")
        require(self, "frames", self.frames >= self.columns, f"at least columns={self.columns}")
        require(self, "num_images", self.num_images == 0 or self.num_images >= 2, "0, or at least 2")


def progressive(study: Study, options: ProgressiveConfig) -> None:
    """Samples images, the first ones of the seed, and writes `progressive`, .json, .md and .png, and its animation.

    Args:
        study: The model and its data.
        options: What to show.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler does not give the estimate.
    """
    yardstick = DistanceToReference(study.evaluator("fd", options.num_images)) if options.num_images else None
    timesteps, frames = estimates(study, max(options.shown, options.num_images), options.frames)
    chosen = np.linspace(0, len(frames) - 1, min(options.columns, len(frames))).round().astype(int).tolist()
    moments = []
    for place in chosen:
        moment = {"t": timesteps[place] + 1, "rmse": rmse(bytes_to_unit(frames[place]), bytes_to_unit(frames[-1]))}
        moments.append(moment | (yardstick(frames[place]) if yardstick else {}))

    shown = [bytes_to_unit(frame[: options.shown]) for frame in frames]
    rows = [("", torch.stack([shown[place][image] for place in chosen])) for image in range(options.shown)]
    study.draw("progressive.png", sheet(rows, [f"t = {moment['t']}" for moment in moments]))
    study.animate(f"progressive.{options.animation}", shown)
    if yardstick:
        report_distances(study, len(study.pipe.scheduler), moments)
    made_by = yardstick.real.made_by if yardstick else {}
    words = text(moments, options.animation, made_by)
    study.write("progressive", "Progressive generation (Fig. 6)", words, {"moments": moments}, asdict(options), made_by)


def estimates(study: Study, count: int, moments: int) -> tuple[list[int], list[Tensor]]:
    """Returns steps `t` and, for each, what is known then of the first images of the seed, as bytes."""
    seed, size = study.subject.seed, study.subject.batch_size
    parts, timesteps = [], []
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        sources = [generator(seed, SAMPLES, number, device=study.accelerator.device) for number in numbers]
        images, timesteps = study.pipe.progressive(len(numbers), sources, len(study.pipe.scheduler), moments, "pt")
        parts.append([to_bytes(frame).cpu() for frame in images])
    return timesteps, [torch.cat(frame) for frame in zip(*parts, strict=True)]


def report_distances(study: Study, total: int, moments: list[dict[str, Any]]) -> None:
    """Draws the distances against the steps that have been taken (Fig. 10)."""
    steps = [total + 1 - moment["t"] for moment in moments]
    curves = {"estimate": (steps, [moment["value"] for moment in moments])}
    if "floor" in moments[0]:
        curves["held-out images"] = (steps, [moment["floor"] for moment in moments])
    labels = {"x_label": "evaluations of the network", "y_label": "Frechet distance"}
    study.plot("progressive_distance.png", curves, **labels, log_y=True, markers=True)


def text(moments: Sequence[dict[str, Any]], animation: str, made_by: dict[str, Any]) -> str:
    """Returns what was found, in Markdown."""
    head = ["t", "RMSE to the image"] + (["Frechet distance"] if made_by else [])
    cells = [[moment[name] for name in ("t", "rmse", "value") if name in moment] for moment in moments]
    words = [
        "The estimate of the image (Eq. 15) at moments of the reverse process, from t = T to 1; RMSE on the scale "
        "[0, 255].",
        "![Progressive generation](progressive.png)",
        f"![As an animation](progressive.{animation})",
        table(head, cells),
    ]
    if made_by:
        words += [
            what_was_compared(moments[-1], made_by),
            "![Distance against the steps taken (Fig. 10)](progressive_distance.png)",
        ]
    return "\n\n".join(words)
